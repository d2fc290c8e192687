"""--to llava, covft, internvl2: the public codes' names, and the fields that their code reads."""

import json
from pathlib import Path

import pytest
from export_runs import llava_options, write_run
from safetensors import safe_open
from tokenizers_for_tests import llama_tokenizer, phi3_tokenizer, sentencepiece_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from covft.checkpoints.export import export_run
from covft.checkpoints.export.folder import write_tokenizer
from covft.models.llm_files import read_llm_config

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


@pytest.mark.parametrize("to", ["llava", "hf-llava", "hf"])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_low_rank_updates_are_merged(
    tiny_options, tmp_path: Path, quantization: str | None, to: str
) -> None:
    if quantization is not None:
        pytest.importorskip("bitsandbytes", reason="pip install 'covft[train]'")
    options = {
        **llava_options(tiny_options, type="Full"),
        "stages": None,
        "model.llm.freeze_embeddings": False,
        "model.llm.lora": dict(rank=2),
        "model.llm.quantization": quantization,
    }
    run = write_run(tmp_path / "run", options)
    assert export_run(run, tmp_path / "out", to=to) < 1e-4
    assert 1e-3 < export_run(run, tmp_path / "half", to=to, dtype="bfloat16") < 0.5


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


LONGROPE = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}


def test_phi3_as_its_first_code_reads_it(tiny_options, tmp_path: Path) -> None:
    fields = dict(
        model_type="phi3",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=420,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_theta=20000.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        rope_scaling={"rope_type": "longrope", **LONGROPE},
    )
    config = AutoConfig.for_model(**fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "phi3")
    phi3_tokenizer().save_pretrained(tmp_path / "phi3")
    (tmp_path / "phi3" / "tokenizer.model").write_bytes(sentencepiece_model().read_bytes())
    options = {
        **llava_options(tiny_options, encoder="InternViT", type="Full"),
        "model.projector": dict(type="PixelShuffleProjector"),
        "model.llm": dict(_delete_=True, type="Phi3", weights=str(tmp_path / "phi3")),
        "model.template": "phi3-chat",
    }
    run = write_run(tmp_path / "run", options)
    assert export_run(run, tmp_path / "out", to="internvl2") < 1e-5
    llm = exported(tmp_path / "out")[0]["llm_config"]
    # OpenGVLab's configuration_phi3.py refuses any other key.
    assert llm["rope_scaling"] == {"type": "su", **LONGROPE} and llm["rope_theta"] == 20000
    assert llm["original_max_position_embeddings"] == 4096
    assert read_llm_config(tmp_path / "out").rope_parameters == config.rope_parameters
    assert (tmp_path / "out" / "tokenizer.model").is_file()


@pytest.mark.parametrize(
    ("scaling", "written"),
    [
        ({"rope_type": "linear", "factor": 2}, {"type": "linear", "factor": 2.0}),
        ({"type": "dynamic", "factor": 4.0}, {"type": "dynamic", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
            {"type": "yarn", "rope_type": "yarn", "factor": 2.0}
            | {"original_max_position_embeddings": 64},
        ),
    ],
)
def test_llama_rope_scaling(tiny_options, tmp_path: Path, scaling: dict, written: dict) -> None:
    arch = {**tiny_options["model.llm.arch"], "rope_scaling": scaling}
    options = {**llava_options(tiny_options, type="Freeze"), "model.llm.arch": arch}
    run = write_run(tmp_path / "run", options)
    assert export_run(run, tmp_path / "out", to="llava") < 1e-6
    found = exported(tmp_path / "out")[0]
    assert {k: found["rope_scaling"].get(k) for k in written} == written
    assert "rope_theta" not in found["rope_scaling"] and found["rope_theta"] == 10000
    if written["type"] != "yarn":
        assert found["rope_scaling"] == written, "transformers 4.37 refuses further keys"
        assert isinstance(found["rope_scaling"]["factor"], float), "it refuses integers, too"


@pytest.mark.parametrize("make", [llama_tokenizer, phi3_tokenizer])
@pytest.mark.parametrize("knows_the_file", [True, False])
def test_what_slow_tokenizers_read(tmp_path: Path, make, knows_the_file: bool) -> None:
    tokenizer = make()
    if not knows_the_file:
        tokenizer.save_pretrained(tmp_path / "source")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
        (tmp_path / "source" / "tokenizer.model").write_bytes(sentencepiece_model().read_bytes())
    write_tokenizer(tmp_path / "out", tokenizer)
    written = (tmp_path / "out" / "tokenizer.model").read_bytes()
    assert written == sentencepiece_model().read_bytes()
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    added = {int(n): token["content"] for n, token in config["added_tokens_decoder"].items()}
    assert added == {n: token for token, n in tokenizer.get_added_vocab().items()}
    if make is phi3_tokenizer:
        end = config["added_tokens_decoder"]["403"]
        assert end["content"] == "<|end|>" and end["rstrip"] and end["special"]
