"""--to llava, covft, internvl2: the public codes' names, and the fields that their code reads."""

import json
from pathlib import Path

import pytest
from export_runs import llava_options, write_run
from safetensors import safe_open

from covft.checkpoints.export import export_run

TOWER = "model.vision_tower.vision_tower.vision_model.encoder.layers"


def exported(folder: Path) -> tuple[dict, set[str]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return json.loads((folder / "config.json").read_text()), set(file.keys())


def test_llava(tiny_options, tmp_path: Path) -> None:
    for vft, tuned in (("Full", True), ("Freeze", False)):
        options = {**llava_options(tiny_options, type=vft), "train_dataset.resize": "pad"}
        run = write_run(tmp_path / f"run{vft}", options)
        assert export_run(run, tmp_path / vft, to="llava") < 1e-6
        config, names = exported(tmp_path / vft)
        assert config["model_type"] == "llava_llama" and config["rope_theta"] == 10000
        assert config["mm_vision_select_layer"] == -1 and config["image_aspect_ratio"] == "pad"
        assert config["mm_projector_type"] == "mlp2x_gelu" and config["mm_hidden_size"] == 32
        assert config["unfreeze_mm_vision_tower"] is tuned
        assert {f"{TOWER}.2.mlp.fc1.weight", "model.mm_projector.2.bias"} <= names


@pytest.mark.parametrize(
    ("vft", "name"),
    [
        (dict(type="CoVFT", num_experts=2), f"{TOWER}.2.mlp.experts.1.0.weight"),
        (dict(type="LoRA", rank=2), f"{TOWER}.2.self_attn.q_proj.lora_down.weight"),
        (dict(type="VPT", num_prompts=2), "model.vision_tower.prompt_embeddings.2"),
    ],
)
def test_covft(tiny_options, tmp_path: Path, vft: dict, name: str) -> None:
    run = write_run(tmp_path / "run", llava_options(tiny_options, **vft))
    assert export_run(run, tmp_path / "out", to="covft") < 1e-6
    config, names = exported(tmp_path / "out")
    assert name in names and config["unfreeze_mm_vision_tower"]
    has_text = any(n.startswith("model.context_embedding_model.") for n in names)
    assert has_text == (vft["type"] == "CoVFT")


def test_internvl2(tiny_options, tmp_path: Path) -> None:
    options = {
        **llava_options(tiny_options, encoder="InternViT", type="Full"),
        "model.projector": dict(type="PixelShuffleProjector"),
        "train_dataset.resize": "tiles",
        "train_dataset.max_tiles": 2,
    }
    run = write_run(tmp_path / "run", options)
    assert export_run(run, tmp_path / "out", to="internvl2") < 1e-6
    config, names = exported(tmp_path / "out")
    assert {"vision_model.encoder.layers.2.attn.qkv.weight", "mlp1.3.bias"} <= names
    assert config["vision_config"]["num_hidden_layers"] == 3 and config["select_layer"] == -1
    assert config["vision_config"]["qkv_bias"] and config["downsample_ratio"] == 0.5
    assert config["dynamic_image_size"] and config["max_dynamic_patch"] == 2
    assert config["llm_config"]["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("to", "change", "message"),
    [
        ("llava", dict(type="CoVFT"), "CoVFT isn't a plain ViT"),
        ("covft", dict(type="SVPT", num_prompts=2), "'blocks.0.prompts' has no"),
        ("internvl2", dict(type="Full"), "PixelShuffleProjector"),
    ],
)
def test_what_a_layout_cannot_hold(
    tiny_options, tmp_path: Path, to: str, change: dict, message: str
) -> None:
    run = write_run(tmp_path / "run", llava_options(tiny_options, **change))
    with pytest.raises(ValueError, match=f"--to {to}: .*{message}.*--to hf"):
        export_run(run, tmp_path / "out", to=to)


def test_llava_has_clip_alone(tiny_options, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", llava_options(tiny_options, encoder="SigLIP", type="Full"))
    with pytest.raises(ValueError, match=r"CLIP encoders alone.*SigLIP; use --to hf-llava"):
        export_run(run, tmp_path / "out", to="llava")
