"""Files that don't fit: each is refused with what to change, and the model stays as it was."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from public_models import (
    ENCODER,
    LLAMA,
    hf_internvl,
    internvl_files,
    llava_files,
    our_internvl,
    our_llava,
    random_llava,
    save,
)

from covft.checkpoints import import_checkpoint
from covft.checkpoints.layouts import LAYOUTS, detect_layout
from covft.weights.files import open_tensors


def refuse(model, path, message, layout=None, error=ValueError):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        import_checkpoint(model, path, layout)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def sharded(folder, tensors, *, suffix="bin"):
    names = list(tensors)
    cut = len(names) // 2
    places = {}
    for number, part in ((1, names[:cut]), (2, names[cut:])):
        file = f"pytorch_model-{number:05}-of-00002.{suffix}"
        save(folder, {name: tensors[name] for name in part}, name=file)
        places |= dict.fromkeys(part, file)
    index = folder / f"pytorch_model.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return folder


def test_shards(tmp_path):
    tensors = llava_files()["llava"]
    sharded(tmp_path, tensors)
    model = our_llava()
    import_checkpoint(model, tmp_path)
    first, _ = sorted(tmp_path.glob("*.bin"))
    refuse(model, first, "is one of 00002 shards; name its folder")
    first.rename(tmp_path / "away")
    refuse(model, tmp_path, r"names 1 of 2 shards that aren't there: pytorch_model-00001-of-00002")
    save(tmp_path, {"x": torch.ones(1)}, name=first.name)
    refuse(model, tmp_path, r"\d+ tensors that .*index.json names aren't in their shards, such as")


def test_files_that_are_no_checkpoint(tmp_path):
    model = our_llava()
    refuse(model, tmp_path / "none", "no weights at", error=FileNotFoundError)
    refuse(model, tmp_path, "expected one of model.safetensors", error=FileNotFoundError)
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"x" * 100)
    refuse(model, broken, "model.safetensors is broken")
    file = tmp_path / "a.pth"
    file.write_bytes(pickle.dumps({"state_dict": Path("x")}))
    refuse(model, file, "a.pth is broken, or holds Python objects")
    torch.save({"state_dict": llava_files()["llava"], "config": Path("x")}, file)
    refuse(model, file, "holds Python objects beside its weights")
    torch.save([torch.ones(1)], file)
    refuse(model, file, "holds no state dict")
    torch.save({"some.weight": torch.ones(1)}, file)
    refuse(model, file, "in none of the layouts covft, llava.*it holds 1 tensors: some.weight")
    torch.save({"base_model.model.x.lora_A.weight": torch.ones(1)}, file)
    refuse(model, file, "LoRA's factors: merge them")


def test_layout_by_name(tmp_path):
    model, folder = our_llava(), save(tmp_path, llava_files()["llava"])
    refuse(model, folder, "no layout 'lava'; did you mean 'llava'", layout="lava")
    refuse(model, folder, r"isn't in layout 'xtuner' .*but in 'llava'", layout="xtuner")
    assert import_checkpoint(model, folder, "llava").layout == "llava"


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_detected_by_its_names_alone(name):
    files = {**llava_files(), **internvl_files(), "covft": None}[name]
    files = files or LAYOUTS["covft"].from_ours(None, our_llava(vft=dict(type="CoVFT")))
    assert detect_layout(files).name == name
    assert detect_layout(our_llava().state_dict()) is None
    assert detect_layout(our_internvl().state_dict()) is None


def test_a_model_of_another_kind(tmp_path):
    llava, internvl = llava_files(), internvl_files()
    for name in ("llava", "hf-llava", "xtuner", "mm_projector"):
        refuse(
            our_internvl(),
            save(tmp_path / name, llava[name]),
            r"with MLPProjector.*projector is PixelShuffleProjector: use a config of that kind",
        )
    for name in ("internvl2", "hf-internvl"):
        refuse(
            our_llava(),
            save(tmp_path / name, internvl[name]),
            "with PixelShuffleProjector, but the model's projector is MLPProjector",
        )
    for kind, families in (("InternViT", "CLIP"), ("DINOv2", "CLIP"), ("SigLIP", "CLIP")):
        encoder = dict(type=kind, arch=ENCODER)
        message = f"the file's encoder is {families}, the model's {kind}; change model.vision"
        refuse(our_llava(encoder=encoder), tmp_path / "llava", message)
    siglip = random_llava(encoder=dict(type="SigLIP", arch=ENCODER))
    files = save(tmp_path / "siglip", LAYOUTS["llava"].from_ours(None, siglip))
    refuse(our_llava(), files, "missing: cls_token, pre_norm.weight")
    dino = dict(type="DINOv2", arch=ENCODER)
    refuse(our_llava(encoder=dino), files, "encoder is CLIP or SigLIP, the model's DINOv2")
    wide = dict(type="CLIP", arch={**ENCODER, "mlp_dim": 96})
    refuse(our_llava(encoder=wide), tmp_path / "llava", r"of another shape: blocks.0.mlp.fc1")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "model.layers.1.mlp.up_proj.weight",
            r"1 missing in the file:\n  llm.model.model.layers.1",
        ),
        ("model.norm.weight", r"1 missing in the file:\n  llm.model.model.norm.weight"),
        ("model.mm_projector.2.bias", r"1 missing in the file:\n  projector.layers.2.bias"),
        (
            "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias",
            "missing: pre_norm.bias",
        ),
    ],
)
def test_missing_names_are_listed(key, message, tmp_path):
    tensors = llava_files()["llava"]
    tensors.pop(key)
    refuse(our_llava(), save(tmp_path, tensors), message)


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("llava", "model.image_newline", r"1 not in the model:\n  llm.model.model.image_newline"),
        ("llava", "audio.weight", "1 keys mean nothing in layout 'llava' .*audio.weight"),
        ("llava", "model.mm_projector.4.weight", r"not in the model:\n  projector.layers.4.weight"),
        ("hf-llava", "multi_modal_projector.linear_3.weight", "'linear_3.weight' has no hf-llava"),
        ("xtuner", "visual_encoder.head.weight", "unexpected: head.weight"),
    ],
)
def test_unexpected_names_are_listed(name, key, message, tmp_path):
    tensors = {**llava_files()[name], key: torch.zeros(2)}
    refuse(our_llava(), save(tmp_path, tensors), message)


def test_buffers_of_older_files_are_read_past(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = {**llava_files()["llava"], name: torch.zeros(4)}
    assert import_checkpoint(our_llava(), save(tmp_path, tensors)).kept == ()


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        (dict(vocab_size=64), "vocabulary has 90 tokens, the model's 64; take the .*vocab_size=90"),
        (dict(hidden_size=64), "LLM is 32 wide, the model's 64: another LLM"),
        (dict(num_hidden_layers=3), "LLM has 2 layers, the model's 3; change model.llm"),
        (
            dict(model_type="phi3", pad_token_id=0),
            r"separate attention projections, the model's fused \(qkv_proj\)",
        ),
    ],
)
def test_another_llm(llm, message, tmp_path):
    tensors = llava_files()["llava"]
    refuse(our_llava(llm=llm), save(tmp_path, tensors), f"Likely cause: .*{message}")


def test_fused_attention_for_a_model_with_separate_projections(tmp_path):
    fused = random_llava(llm=dict(model_type="phi3", pad_token_id=0))
    files = LAYOUTS["llava"].from_ours(None, fused)
    refuse(our_llava(), save(tmp_path / "phi3", files), r"LLM has fused \(qkv_proj\).*separate")
    wqkv = {re.sub(r"self_attn\.qkv_proj", "attention.wqkv", n): v for n, v in files.items()}
    refuse(our_llava(), save(tmp_path / "intern", wqkv), r"LLM has fused \(wqkv\)")


@pytest.mark.parametrize(
    ("vft", "text", "message"),
    [
        (
            dict(type="CoVFT", num_experts=2, first_block=0),
            {},
            r"dict\(type='CoVFT', num_experts=3, first_block=0, last_block=1\)",
        ),
        (dict(type="CoVFT", num_experts=3), {}, r"num_experts=3, first_block=0, last_block=1\)"),
        (dict(type="Freeze"), {}, r"is tuned by CoVFT; set model.vision.vft to .*is Freeze\)"),
        (dict(type="SVPT"), {}, r"is tuned by CoVFT; set model.vision.vft to .*is SVPT\)"),
        (
            dict(type="CoVFT", num_experts=3, first_block=0),
            dict(hidden_size=32),
            "context is 24 wide, that of model.text_encoder 32",
        ),
        (
            dict(type="CoVFT", num_experts=3, first_block=0, shared_cve=True),
            {},
            "different values for .* which the model shares",
        ),
    ],
)
def test_another_covft(vft, text, message, tmp_path):
    model = random_llava(vft=dict(type="CoVFT", num_experts=3, first_block=0))
    files = LAYOUTS["covft"].from_ours(None, model)
    refuse(our_llava(vft=vft, text=text), save(tmp_path, files), message)


@pytest.mark.parametrize(
    ("vft", "other", "message"),
    [
        (dict(type="LoRA", rank=2), dict(type="LoRA", rank=4), r"dict\(type='LoRA', rank=2\)"),
        (
            dict(type="VPT", num_prompts=3),
            dict(type="VPT", num_prompts=4),
            r"dict\(type='VPT', num_prompts=3\)",
        ),
    ],
)
def test_another_rank_or_number_of_prompts(vft, other, message, tmp_path):
    files = LAYOUTS["covft"].from_ours(None, random_llava(vft=vft))
    refuse(our_llava(vft=other), save(tmp_path, files), message)


def test_lora_of_xtuner(tmp_path):
    lora = "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    files = {**llava_files()["mm_projector"], lora: torch.zeros(2, 32)}
    files = {k.replace("model.mm_projector.", "projector.model."): v for k, v in files.items()}
    refuse(our_llava(), save(tmp_path, files), "1 LoRA weights.*lora_alpha.*merge")


def llava_config(**changes):
    vision = dict(
        model_type="clip_vision_model",
        image_size=32,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    config = dict(vision_feature_layer=-2, text_config=dict(LLAMA), vision_config=vision)
    for key, value in changes.items():
        part, _, field = key.rpartition("__")
        (config[part] if part else config)[field] = value
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vision_feature_layer=-1), "reads the output of block 3, the model that of block 2"),
        (dict(text_config__num_attention_heads=8), "num_attention_heads is 8, the model's 4"),
        (dict(text_config__rope_theta=5e5), "rope_theta is 500000, the model's 10000"),
        (
            dict(text_config__rope_scaling={"type": "linear", "factor": 4.0}),
            r"rope scaling is \{'type': 'linear', 'factor': 4.0\}, the model's \{\}",
        ),
        (dict(vision_config__num_attention_heads=2), "encoder's num_heads is 2, the model's 4"),
        (
            dict(vision_config__hidden_act="gelu"),
            "encoder's act is 'gelu', the model's 'quick_gelu'",
        ),
    ],
)
def test_what_shapes_do_not_show_but_config_json_does(changes, message, tmp_path):
    save(tmp_path, llava_files()["hf-llava"])
    (tmp_path / "config.json").write_text(json.dumps(llava_config()))
    assert import_checkpoint(our_llava(), tmp_path).kept == ()
    (tmp_path / "config.json").write_text(json.dumps(llava_config(**changes)))
    refuse(our_llava(), tmp_path, f"config.json and the model differ: .*{message}")


def test_config_of_llava_s_own_code(tmp_path):
    save(tmp_path, llava_files()["llava"])
    own = {**LLAMA, "mm_vision_tower": "openai/clip", "mm_vision_select_layer": -2}
    (tmp_path / "config.json").write_text(json.dumps(own))
    import_checkpoint(our_llava(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**own, "num_attention_heads": 2}))
    refuse(our_llava(), tmp_path, "the LLM's num_attention_heads is 2, the model's 4")


def test_config_of_internvl(tmp_path):
    hf_internvl().save_pretrained(tmp_path)
    import_checkpoint(our_internvl(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["layer_norm_eps"] = 1e-3
    (tmp_path / "config.json").write_text(json.dumps(config))
    refuse(our_internvl(), tmp_path, "the encoder's norm_eps is 0.001, the model's 1e-06")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory counters")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_files_are_mapped_not_read(name, tmp_path):
    # One tensor that is too large for malloc to take from memory that was freed before.
    save(tmp_path, {"w": torch.ones(1 << 24)}, name=name)

    def held():
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024

    before = held()
    tensors = open_tensors(tmp_path)
    assert tensors["w"].sum() == 1 << 24
    assert held() - before < 24  # of 64 MiB
