"""Loading public checkpoints: every layout, and an answer to everything that doesn't fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from covft.models.vision import CLIP, DINOv2, DINOv3, InternViT, SigLIP


def _edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _tensors(folder):
    return load_file(folder / "model.safetensors")


def _assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


def test_export_is_what_transformers_loads(family, pixels, tmp_path):
    """Our export, loaded by transformers, is the model that we had loaded, bit for bit."""
    family.save(tmp_path / "hub")
    ours = family.load(tmp_path / "hub", select_layer=-1)
    exported = ours.export_state_dict()
    published = _tensors(tmp_path / "hub")
    if family.ours in (CLIP, SigLIP):  # the hub's files have the prefix, transformers 5 saves none
        published = {f"vision_model.{name}": tensor for name, tensor in published.items()}
    assert exported.keys() <= published.keys()
    _assert_same(exported, {name: published[name] for name in exported})
    _assert_same(dict(ours.import_state_dict(exported)), dict(ours.state_dict()))

    (tmp_path / "out").mkdir()
    save_file({n: t.clone() for n, t in exported.items()}, tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "config.json").write_text((tmp_path / "hub" / "config.json").read_text())
    again = family.model.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = again(pixels, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(
            ours(pixels), expected[:, family.num_prefix :], atol=1e-5, rtol=1e-5
        )


def test_export_refuses_a_changed_encoder(tiny):
    backbone = CLIP(arch=tiny)
    plain = backbone.state_dict()
    backbone.blocks[0].mlp.expert = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"blocks.0.mlp.expert.weight.*fine-tuning method"):
        backbone.export_state_dict()
    assert len(backbone.export_state_dict(plain)) == len(plain)
    # A checkpoint still goes into the plain encoder.
    _assert_same(backbone.import_state_dict(backbone.export_state_dict(plain)), dict(plain))


@pytest.mark.parametrize(
    ("ours", "model", "config"),
    [(CLIP, CLIPModel, CLIPConfig), (SigLIP, SiglipModel, SiglipConfig)],
)
def test_the_tower_is_found_inside_a_model_with_a_text_tower(
    ours, model, config, families, pixels, tmp_path
):
    family = families[ours.__name__]
    vision = family.reference().config.to_dict()
    text = {**{k: vision[k] for k in ("hidden_size", "intermediate_size")}, "vocab_size": 50}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    whole = model(config(text_config=text, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path)
    backbone = ours(weights=str(tmp_path))
    assert backbone.config.image_size == 32
    assert backbone.config.depth == 3
    with torch.no_grad():
        expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(
            backbone(pixels), expected[:, family.num_prefix :], atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize(
    "prefix",
    ["vision_model.", "model.vision_tower.", "model.vision_tower.vision_tower.vision_model."],
)
def test_any_prefix_beside_any_llm(family, prefix, tmp_path):
    family.save(tmp_path)
    backbone = family.load(tmp_path)
    state = {prefix + name: tensor for name, tensor in _tensors(tmp_path).items()}
    beside = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.mm_projector.0.weight",
        "language_model.model.embed_tokens.weight",
        "model.language_model.layers.0.mlp.gate_proj.weight",
        "mlp1.0.weight",
        "multi_modal_projector.linear_1.weight",
        "lm_head.weight",
    ]
    whole = {**state, **{name: torch.zeros(1) for name in beside}}
    _assert_same(backbone.import_state_dict(whole), dict(backbone.state_dict()))
    with pytest.raises(ValueError, match=r"unexpected: audio_tower\.weight"):
        backbone.import_state_dict({**whole, "audio_tower.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"expected one vision encoder.*found .*other\."):
        twice = {f"other.{name}": tensor for name, tensor in _tensors(tmp_path).items()}
        backbone.import_state_dict({**state, **twice})


def test_names_that_transformers_uses_in_memory(family, tmp_path):
    reference = family.save(tmp_path)
    backbone = family.load(tmp_path)
    _assert_same(backbone.import_state_dict(reference.state_dict()), dict(backbone.state_dict()))


def test_opengvlab_layout_with_fused_qkv(families, pixels, tmp_path):
    """The names and shapes of OpenGVLab's InternVL2 files, made from transformers' model."""
    reference = families["InternViT"].reference()
    state = {}
    names = {
        "embeddings.cls_token": "embeddings.class_embedding",
        "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
        "embeddings.position_embeddings": "embeddings.position_embedding",
        "encoder.layer.": "encoder.layers.",
        "attention.projection_layer": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "lambda_": "ls",
    }
    hf = reference.state_dict()
    hf.pop("embeddings.mask_token")
    for name, tensor in hf.items():
        if "attention.q_proj" in name:
            parts = [hf[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            name, tensor = name.replace("attention.q_proj", "attn.qkv"), torch.cat(parts)
        elif "k_proj" in name or "v_proj" in name:
            continue
        for theirs, public in names.items():
            name = name.replace(theirs, public)
        state[f"vision_model.{name}"] = tensor.clone()
    assert state["vision_model.encoder.layers.0.attn.qkv.weight"].shape == (96, 32)
    save_file(
        {**state, "language_model.lm_head.weight": torch.zeros(2), "mlp1.0.weight": torch.ones(2)},
        tmp_path / "model.safetensors",
    )
    vision = {
        "model_type": "intern_vit_6b",
        "architectures": ["InternVisionModel"],
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "drop_path_rate": 0.1,
    }
    config = {"model_type": "internvl_chat", "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = InternViT(weights=str(tmp_path))
    assert backbone.config.drop_path == 0  # a training choice, not the weights'
    with torch.no_grad():
        expected = reference(pixels).last_hidden_state[:, 1:]
        torch.testing.assert_close(backbone(pixels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["safetensors shards", "bin", "bin shards"])
def test_other_files(kind, families, tmp_path):
    families["CLIP"].save(tmp_path)
    expected = families["CLIP"].load(tmp_path).state_dict()
    tensors = _tensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = [{n: tensors[n] for n in names[:9]}, {n: tensors[n] for n in names[9:]}]
    if kind == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        suffix, save = ("bin", torch.save) if "bin" in kind else ("safetensors", save_file)
        index = {n: f"part-{i}.{suffix}" for i, half in enumerate(halves) for n in half}
        index["lm_head.weight"] = f"part-llm.{suffix}"  # a shard that needn't be there
        for i, half in enumerate(halves):
            save(half, tmp_path / f"part-{i}.{suffix}")
        stem = "pytorch_model.bin" if "bin" in kind else "model.safetensors"
        (tmp_path / f"{stem}.index.json").write_text(json.dumps({"weight_map": index}))
    _assert_same(dict(families["CLIP"].load(tmp_path).state_dict()), dict(expected))
    if "shards" in kind:
        next(tmp_path.glob("part-1.*")).unlink()
        with pytest.raises(ValueError, match="aren't there: part-1"):
            families["CLIP"].load(tmp_path)


def test_a_folder_without_weights(families, tmp_path):
    families["CLIP"].save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no weights in .*model\.safetensors, pytorch_model\.bin"):
        families["CLIP"].load(tmp_path)


def test_half_precision_weights_become_the_default_type(families, pixels, tmp_path):
    families["SigLIP"].reference().half().save_pretrained(tmp_path)
    backbone = families["SigLIP"].load(tmp_path)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert backbone(pixels).dtype == torch.float32


def test_config_json_decides_the_architecture(family, tmp_path):
    family.save(tmp_path, layer_norm_eps=1e-3)
    config = family.load(tmp_path).config
    assert (config.hidden_dim, config.depth, config.num_heads, config.mlp_dim) == (32, 3, 4, 64)
    assert (config.patch_size, config.image_size, config.norm_eps) == (8, 32, 1e-3)


def test_fields_that_config_json_leaves_out_have_transformers_defaults(family):
    """The hub's configs leave out what equals the default, DINOv2's patch size for one."""
    defaults = family.config()
    found = family.ours.fields_from_config({"model_type": defaults.model_type})
    assert found == family.ours.fields_from_config(defaults.to_dict())
    assert found["depth"] == defaults.num_hidden_layers


def test_another_family(families, tmp_path):
    families["SigLIP"].save(tmp_path)
    message = "model_type 'siglip_vision_model', CLIP expects clip_vision_model or clip"
    with pytest.raises(ValueError, match=message):
        CLIP(weights=str(tmp_path))


def test_arch_and_config_json_must_agree(families, tiny, tmp_path):
    families["CLIP"].save(tmp_path)
    folder = str(tmp_path)
    CLIP(weights=folder, arch=tiny)
    with pytest.raises(ValueError, match=r"depth: arch 4, config\.json 3"):
        CLIP(weights=folder, arch={**tiny, "depth": 4})
    with pytest.raises(ValueError, match=r"hidden_dim: arch 1024, config.json 32; depth: arch 24"):
        CLIP(weights=folder, arch="large-patch14-336")
    with pytest.raises(ValueError, match=r"image_size: arch 64, config\.json 32.*set image_size"):
        CLIP(weights=folder, arch={**tiny, "image_size": 64})
    assert CLIP(weights=folder, arch=tiny, image_size=64).num_tokens == 64


def test_without_config_json_arch_is_needed(families, tiny, tmp_path):
    families["CLIP"].save(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json .* give the backbone's arch"):
        CLIP(weights=str(tmp_path))
    assert len(CLIP(weights=str(tmp_path), arch=tiny).blocks) == 2


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("DINOv2", {"use_swiglu_ffn": True}, "use_swiglu_ffn=True, DINOv2 supports False only"),
        ("DINOv3", {"use_gated_mlp": True}, "use_gated_mlp=True"),
        ("InternViT", {"use_qk_norm": True}, "use_qk_norm=True"),
        ("InternViT", {"image_size": [32, 64]}, "expected a square"),
        ("CLIP", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ],
)
def test_encoders_that_this_vit_can_not_be(name, changes, message, families, tmp_path):
    families[name].save(tmp_path)
    _edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        families[name].load(tmp_path)


def test_missing_misshapen_and_unexpected_keys_are_listed(family, tmp_path):
    family.save(tmp_path)
    tensors = _tensors(tmp_path)
    first_bias = next(name for name in tensors if ".0." in name and "norm" in name)
    second_bias = next(name for name in tensors if ".1." in name and "norm" in name)
    last = next(name for name in tensors if ".2." in name)
    unexpected = last.replace(".2.", ".3.")
    broken = {**tensors, second_bias: torch.zeros(5), unexpected: tensors[last].clone()}
    del broken[first_bias]
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        family.load(tmp_path, select_layer=2)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "missing: blocks.0.norm" in message
    assert "of another shape: blocks.1.norm" in message
    assert "(5,) instead of (32,)" in message
    assert "unexpected: blocks.3." in message


def test_a_parameter_that_a_built_block_lacks_is_unexpected(families, tmp_path):
    families["DINOv3"].save(tmp_path, key_bias=True)
    assert families["DINOv3"].load(tmp_path).config.k_bias
    _edit_config(tmp_path, key_bias=False)
    with pytest.raises(ValueError, match=r"unexpected: blocks\.0\.attn\.k_proj\.bias, blocks\.1"):
        families["DINOv3"].load(tmp_path)


def test_unbuilt_blocks_may_be_absent(families, tmp_path):
    families["CLIP"].save(tmp_path)
    tensors = {n: t for n, t in _tensors(tmp_path).items() if ".2." not in n and "post" not in n}
    save_file(tensors, tmp_path / "model.safetensors")
    assert len(families["CLIP"].load(tmp_path, select_layer=-2).blocks) == 2
    with pytest.raises(ValueError, match=r"missing: blocks\.2\.norm1\.weight.* and \d+ more"):
        families["CLIP"].load(tmp_path, select_layer=-1)


@pytest.mark.parametrize("size", [16, 40, 64])
def test_positions_are_interpolated_as_transformers_does(size, families, tmp_path):
    reference = families["DINOv2"].save(tmp_path)
    backbone = families["DINOv2"].load(tmp_path, image_size=size)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(backbone(pixels), expected, atol=2e-6, rtol=2e-5)
    assert backbone.image_spec.image_size == size


def test_positions_without_a_class_token_are_interpolated_too(families, tmp_path):
    reference = families["SigLIP"].save(tmp_path)
    backbone = families["SigLIP"].load(tmp_path, image_size=64)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        out = reference(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
        torch.testing.assert_close(backbone(pixels), out.hidden_states[-2], atol=2e-6, rtol=2e-5)


def test_dinov3_takes_its_size_from_the_recipe_not_from_config_json(families, pixels, tmp_path):
    families["DINOv3"].save(tmp_path)
    backbone = DINOv3(weights=str(tmp_path))
    assert backbone.image_spec.image_size == 384
    assert backbone.num_tokens == 48 * 48  # patches of 8 px


def test_pretrained_asks_for_the_variants_hub_id(monkeypatch, families, tiny, tmp_path):
    folder = tmp_path / "small"
    families["DINOv2"].save(folder, hidden_size=384, num_hidden_layers=12, num_attention_heads=6,
                            mlp_ratio=4, patch_size=14, image_size=518)  # fmt: skip
    asked = []
    monkeypatch.setattr("covft.weights.resolve", lambda name: asked.append(name) or folder)
    assert len(DINOv2(weights="pretrained").blocks) == 11
    assert DINOv2(weights="pretrained", arch="small-patch14", image_size=112).num_tokens == 64
    assert DINOv2(weights="me/mine").hub_id is None
    assert asked == ["facebook/dinov2-small"] * 2 + ["me/mine"]
    with pytest.raises(ValueError, match="'pretrained' needs a named arch"):
        DINOv2(weights="pretrained", arch=tiny)


def test_weights_on_the_meta_device_are_refused(families, tmp_path):
    families["CLIP"].save(tmp_path)
    with torch.device("meta"), pytest.raises(ValueError, match="build with weights=None"):
        families["CLIP"].load(tmp_path)
