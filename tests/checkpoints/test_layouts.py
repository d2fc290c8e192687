"""Names in both directions, and the methods of CoVFT's public code."""

import pytest
import torch
from public_models import (
    ENCODER,
    TEXT_WIDTH,
    hf_llava,
    llava_files,
    our_internvl,
    our_llava,
    random_llava,
    randomise,
    save,
)

from covft.checkpoints import import_checkpoint
from covft.checkpoints.layouts import LAYOUTS, infer_method, plain_state_dict
from covft.config import load_config, stage_configs
from covft.models.abstract import abstract_model
from covft.models.text_encoder import LLMEmbeddings
from covft.registry import VFT
from covft.vft.comoe import CoMoE

PLAIN = [name for name in LAYOUTS if name not in ("internvl2", "hf-internvl", "covft")]
METHODS = {
    "covft": dict(type="CoVFT"),
    "one-block": dict(type="CoVFT", num_experts=3, first_block=0, last_block=0),
    "shared-cve": dict(type="CoVFT", first_block=0, shared_cve=True),
    "text-only": dict(type="CoVFT", context="text-only"),
    "image-only": dict(type="CoVFT", context="image-only"),
    "concat": dict(type="CoVFT", context="concat"),
    "none": dict(type="CoVFT", context="none"),
    "uniform": dict(type="CoVFT", routing="uniform"),
    "sparse": dict(type="CoVFT", routing="sparse@2"),
    "lora": dict(type="LoRA", rank=2),
    "vpt": dict(type="VPT", num_prompts=3),
    "bitfit": dict(type="BitFit"),
}
INFERRED = {
    "covft": dict(type="CoVFT", num_experts=4, first_block=1, last_block=1),
    "one-block": dict(type="CoVFT", num_experts=3, first_block=0, last_block=0),
    "shared-cve": dict(type="CoVFT", num_experts=4, first_block=0, last_block=1),
    **{
        name: dict(type="CoVFT", num_experts=4, first_block=1, last_block=1, context=name)
        for name in ("text-only", "image-only", "concat", "none")
    },
    "uniform": dict(type="CoVFT", num_experts=4, first_block=1, last_block=1, routing="uniform"),
    "sparse": dict(type="CoVFT", num_experts=4, first_block=1, last_block=1),
    "lora": dict(type="LoRA", rank=2),
    "vpt": dict(type="VPT", num_prompts=3),
    "bitfit": {},
}


def shapes_of(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


def assert_same_weights(model, other):
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", PLAIN)
def test_llava_round_trip(name, tmp_path):
    model, again = random_llava(), our_llava(seed=5)
    written = LAYOUTS[name].from_ours(None, model)
    import_checkpoint(again, save(tmp_path, written))
    rewritten = LAYOUTS[name].from_ours(None, again)
    assert rewritten.keys() == written.keys()
    assert all(torch.equal(rewritten[key], value) for key, value in written.items())
    if name != "mm_projector":
        assert_same_weights(model, again)


@pytest.mark.parametrize("name", ["llava", "mm_projector", "xtuner"])
def test_linear_projector(name, tmp_path):
    model, again = random_llava(type="LinearProjector"), our_llava(type="LinearProjector", seed=5)
    written = LAYOUTS[name].from_ours(None, model)
    key = {"xtuner": "projector.model.0.weight"}.get(name, "model.mm_projector.weight")
    assert torch.equal(written[key], model.projector.linear.weight)
    import_checkpoint(again, save(tmp_path, written))
    assert torch.equal(again.projector.linear.weight, model.projector.linear.weight)


@pytest.mark.parametrize("name", ["internvl2", "hf-internvl"])
def test_internvl_round_trip(name, tmp_path):
    model, again = our_internvl(), our_internvl(seed=5)
    randomise(model)
    assert (
        import_checkpoint(again, save(tmp_path, LAYOUTS[name].from_ours(None, model))).layout
        == name
    )
    assert_same_weights(model, again)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_public_layout(name, tmp_path):
    model, again = random_llava(vft=METHODS[name]), our_llava(vft=METHODS[name], seed=5)
    written = LAYOUTS["covft"].from_ours(None, model)
    assert infer_method(shapes_of(written)) == INFERRED[name]
    imported = import_checkpoint(again, save(tmp_path, written))
    assert imported.layout == ("llava" if name == "bitfit" else "covft")
    assert imported.kept == ()
    assert_same_weights(model, again)


def test_names_and_shapes_of_covft():
    """Those of the public code, at the miniature's widths; block 2 is never read."""
    model = random_llava(vft=dict(type="CoVFT", num_experts=2))
    found = shapes_of(LAYOUTS["covft"].from_ours(None, model))
    layer = "model.vision_tower.vision_tower.vision_model.encoder.layers.1."
    d, f, c = ENCODER["hidden_dim"], ENCODER["mlp_dim"], TEXT_WIDTH
    expected = {
        f"mlp.experts.{n}.{key}": shape
        for n in range(2)
        for key, shape in {
            "0.weight": (f, d),
            "0.bias": (f,),
            "2.weight": (d, f),
            "2.bias": (d,),
        }.items()
    }
    for name, width in (("image", d), ("text", c)):
        expected |= {
            f"mlp.{name}_resblock.fc1.weight": (2 * width, width),
            f"mlp.{name}_resblock.fc1.bias": (2 * width,),
            f"mlp.{name}_resblock.fc2.weight": (width, 2 * width),
            f"mlp.{name}_resblock.fc2.bias": (width,),
            f"mlp.{name}_resblock.ln.weight": (width,),
            f"mlp.{name}_resblock.ln.bias": (width,),
        }
    attention = torch.nn.MultiheadAttention(c, 4, kdim=d + c, vdim=d + c)
    gate = torch.nn.Linear(c, 2)
    expected |= {f"mlp.cross_attn.{k}": tuple(v.shape) for k, v in attention.state_dict().items()}
    expected |= {f"mlp.gate.{k}": tuple(v.shape) for k, v in gate.state_dict().items()}
    assert {
        k.removeprefix(layer): v for k, v in found.items() if k.startswith(f"{layer}mlp.")
    } == expected
    plain = llava_files()["llava"]
    beside = {key for key in found if not key.startswith(f"{layer}mlp.")}
    assert beside - plain.keys() == {
        f"model.context_embedding_model.{key}" for key in model.text_encoder.model.state_dict()
    }
    missing = plain.keys() - beside
    assert all(".mlp.fc" in k or ".layers.2." in k or "post_layernorm" in k for k in missing)


def test_full_size_of_covft():
    """LLaVA-1.5-7B: 529.0 M vision weights train in the public code, 7.288 B in all."""
    recipe = stage_configs(load_config("llava15_7b_covft"))[-1][1]
    model = abstract_model(recipe.model)
    public = LAYOUTS["covft"].from_ours(model.state_dict(), model)
    assert infer_method(shapes_of(public)) == dict(
        type="CoVFT", num_experts=4, first_block=11, last_block=22
    )
    comoe = (".mlp.experts.", "_resblock.", ".cross_attn.", ".mlp.gate.", ".layer_norm")
    trained = sum(v.numel() for k, v in public.items() if any(part in k for part in comoe))
    assert trained == 529_003_568
    beside = ("model.vision_tower.", "model.context_embedding_model.")
    rest = sum(v.numel() for k, v in public.items() if not k.startswith(beside))
    assert round((trained + rest) / 1e9, 3) == 7.288
    assert LAYOUTS["covft"].to_ours(public, model).keys() == model.state_dict().keys()


def test_names_and_shapes_of_lora_and_vpt():
    tower = "model.vision_tower."
    attention = f"{tower}vision_tower.vision_model.encoder.layers.0.self_attn."
    found = shapes_of(LAYOUTS["covft"].from_ours(None, random_llava(vft=METHODS["lora"])))
    assert {k.removeprefix(attention): v for k, v in found.items() if k.startswith(attention)} == {
        f"{projection}_proj.{key}": shape
        for projection in ("q", "k", "v", "out")
        for key, shape in {
            "original_layer.weight": (32, 32),
            "original_layer.bias": (32,),
            "lora_down.weight": (2, 32),
            "lora_up.weight": (32, 2),
        }.items()
    }
    found = shapes_of(LAYOUTS["covft"].from_ours(None, random_llava(vft=METHODS["vpt"])))
    prompts = {k: v for k, v in found.items() if "prompt" in k}
    assert prompts == {f"{tower}prompt_embeddings.{n}": (1, 3, 32) for n in range(2)}


def test_what_the_public_code_saves_and_nothing_reads(tmp_path):
    """Its prompts and LoRA in CLIP's last block, BERT's pooler, and BERT with plain encoders."""
    layer = "model.vision_tower.vision_tower.vision_model.encoder.layers.2."
    last = {k: v for k, v in llava_files()["llava"].items() if k.startswith(layer)}
    bert = {
        "model.context_embedding_model.pooler.dense.weight": torch.zeros(24, 24),
        "model.context_embedding_model.embeddings.position_ids": torch.zeros(1, 8),
    }
    for name, extra in {
        "covft": {**last, **bert},
        "vpt": {**last, "model.vision_tower.prompt_embeddings.2": torch.zeros(1, 3, 32)},
        "lora": {
            **{k.replace("_proj.", "_proj.original_layer."): v for k, v in last.items()},
            f"{layer}self_attn.q_proj.lora_down.weight": torch.zeros(2, 32),
        },
        "bitfit": {"model.context_embedding_model.embeddings.x": torch.zeros(2)},
    }.items():
        model, again = random_llava(vft=METHODS[name]), our_llava(vft=METHODS[name], seed=5)
        files = {**LAYOUTS["covft"].from_ours(None, model), **extra}
        import_checkpoint(again, save(tmp_path / name, files))
        assert_same_weights(model, again)


@pytest.mark.parametrize(
    "vft", [dict(type="CoVFT"), dict(type="LoRA"), dict(type="VPT"), dict(type="QA-ViT")]
)
def test_a_method_starts_from_the_file_s_plain_encoder(vft, tmp_path):
    plain = random_llava()
    save(tmp_path, LAYOUTS["llava"].from_ours(None, plain))
    model = our_llava(vft=vft, seed=5)
    before = torch.get_rng_state()
    imported = import_checkpoint(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert imported.kept == (("text_encoder",) if model.text_encoder else ())
    pixels = torch.randn(2, 3, 32, 32)
    if VFT.get(vft["type"]).identity_at_init:
        context = None
        if model.text_encoder is not None:
            words = torch.ones(2, 3, dtype=torch.long)
            context = model.text_encoder(words, words.bool())
        with torch.no_grad():
            torch.testing.assert_close(
                model.vision(pixels, context), plain.vision(pixels), atol=1e-4, rtol=1e-5
            )
    fc1 = plain.state_dict()["vision.backbone.blocks.1.mlp.fc1.weight"]
    for name, value in model.state_dict().items():
        if name.endswith(("blocks.1.mlp.fc1.weight", "blocks.1.block.mlp.fc1.weight")):
            assert torch.equal(value, fc1)
        if name.endswith("blocks.1.mlp.experts.up"):
            assert torch.equal(value, fc1.repeat(4, 1))
    trained = [p for p in model.vision.parameters() if p.requires_grad]
    assert trained and all(p.isfinite().all() for p in trained)


def test_merged_lora_and_a_given_state():
    model = random_llava(vft=METHODS["lora"])
    merged = LAYOUTS["llava"].from_ours(None, model)
    attn = model.vision.backbone.blocks[0].attn.q_proj
    name = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"
    assert torch.equal(merged[name], attn.merged_weight())
    assert not torch.equal(merged[name], attn.base.weight)
    zeros = {key: torch.zeros_like(value) for key, value in plain_state_dict(model).items()}
    assert all(not value.any() for value in LAYOUTS["llava"].from_ours(zeros, model).values())


def test_a_given_state_of_comoe_leaves_the_model_alone():
    model = random_llava(vft=METHODS["covft"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    zeros = {n: torch.zeros_like(value, dtype=torch.bfloat16) for n, value in before.items()}
    written = LAYOUTS["covft"].from_ours(zeros, model)
    assert not any(value.any() for value in written.values())
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.vision.backbone.blocks[1].mlp, CoMoE)


def test_lora_of_the_llm_is_merged_and_can_start_from_a_file(tmp_path):
    plain = random_llava()
    files = LAYOUTS["llava"].from_ours(None, plain)
    torch.manual_seed(0)
    model = our_llava(seed=5)
    adapted = type(model)(
        vision=dict(backbone=dict(type="CLIP", arch=ENCODER)),
        projector=dict(type="MLPProjector"),
        llm=dict(type="CausalLM", arch=model.llm.model.config.to_dict(), lora=dict(rank=2)),
    )
    imported = import_checkpoint(adapted, save(tmp_path, files))
    assert not any("lora" in name for name in imported.names)
    for name, value in LAYOUTS["llava"].from_ours(None, adapted).items():
        assert torch.equal(value, files[name]), name
    layer = adapted.llm.model.model.layers[0].self_attn.q_proj
    torch.nn.init.ones_(layer.lora_b)
    changed = LAYOUTS["llava"].from_ours(None, adapted)
    names = {n for n in files if not torch.equal(changed[n], files[n])}
    assert names == {"model.layers.0.self_attn.q_proj.weight"}


def test_tied_output_layer(tmp_path):
    tied = dict(tie_word_embeddings=True)
    model, again = random_llava(llm=tied), our_llava(llm=tied, seed=5)
    written = LAYOUTS["hf-llava"].from_ours(None, model)
    assert "language_model.lm_head.weight" not in written
    import_checkpoint(again, save(tmp_path / "a", written))
    assert_same_weights(model, again)
    table = written["language_model.model.embed_tokens.weight"]
    both = {**written, "language_model.lm_head.weight": table}
    import_checkpoint(our_llava(llm=tied), save(tmp_path / "b", both))
    with pytest.raises(ValueError, match=r"output layer of its own.*tie_word_embeddings=False"):
        other = {**both, "language_model.lm_head.weight": table + 1}
        import_checkpoint(again, save(tmp_path / "c", other))
    with pytest.raises(ValueError, match=r"1 missing in the file:\n  llm\.model\.lm_head"):
        import_checkpoint(our_llava(), tmp_path / "a")


@pytest.mark.parametrize(
    ("make", "layout", "message"),
    [
        (lambda: our_llava(vft=METHODS["covft"]), "llava", "by CoVFT isn't a plain ViT"),
        (lambda: our_llava(vft=dict(type="QMoE")), "covft", "no connector behind it"),
        (lambda: our_llava(vft=dict(type="SVPT")), "covft", "has no public name"),
        (lambda: our_llava(), "internvl2", "PixelShuffleProjector, but the model's projector is"),
        (lambda: our_internvl(), "llava", "MLPProjector or LinearProjector, but the model's"),
        (lambda: our_internvl(), "covft", "layout 'covft' holds CLIP .*encoder is InternViT"),
        (lambda: our_llava(depth=3), "hf-llava", "'layers.4.weight' has no name in layout"),
        (
            lambda: our_llava(type="PixelShuffleProjector"),
            "internvl2",
            "holds InternViT, but the model's encoder is CLIP",
        ),
    ],
)
def test_what_a_layout_cannot_hold(make, layout, message):
    with pytest.raises(ValueError, match=message):
        LAYOUTS[layout].from_ours(None, make())


def test_context_that_the_public_layout_has_no_place_for(tmp_path):
    vft = dict(type="CoVFT", num_experts=2)
    files = LAYOUTS["covft"].from_ours(None, random_llava(vft=vft))
    model = our_llava(vft=vft)
    model.text_encoder = LLMEmbeddings(llm=model.llm)
    with pytest.raises(ValueError, match=r"holds BERT .* but the model's is LLMEmbeddings"):
        LAYOUTS["covft"].from_ours(None, model)
    with pytest.raises(ValueError, match=r"context is 24 wide, that of model\.text_encoder 32"):
        import_checkpoint(model, save(tmp_path, files))


def test_infer_method_refuses_layers_that_differ():
    files = shapes_of(LAYOUTS["covft"].from_ours(None, random_llava(vft=METHODS["shared-cve"])))
    expert = "encoder.layers.1.mlp.experts.3."
    with pytest.raises(ValueError, match=r"different numbers of experts: \[3, 4\]"):
        infer_method({name: shape for name, shape in files.items() if expert not in name})
    moved = {
        name.replace("layers.1.mlp.experts", "layers.5.mlp.experts"): s for name, s in files.items()
    }
    with pytest.raises(ValueError, match=r"aren't contiguous: \[0, 5\]"):
        infer_method(moved)


def test_vocabulary_that_transformers_adds_is_left_out_and_counted(monkeypatch):
    told = []
    monkeypatch.setattr(
        "covft.checkpoints.layouts.hf_llava.print_log", lambda text, **_: told.append(text)
    )
    state = {"lm_head.weight": torch.randn(192, 32), **hf_llava().state_dict()}
    for rows, kept in ((90, 90), (92, 90), (128, 90), (129, 129)):
        state["lm_head.weight"] = torch.randn(rows, 32)
        told.clear()
        ours = LAYOUTS["hf-llava"].to_ours(state, our_llava())
        assert torch.equal(ours["llm.model.lm_head.weight"], state["lm_head.weight"][:kept])
        messages = [text for text in told if "lm_head.weight has" in text]
        assert len(messages) == (kept < rows)
        for message in messages:
            assert f"{rows} rows" in message and f"the last {rows - kept} are left out" in message
