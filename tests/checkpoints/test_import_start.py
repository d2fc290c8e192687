"""What ``load_from`` says of DeepSpeed's files, parts of a model, and folders without weights."""

import pytest
import torch
from mmengine.config import Config
from public_models import llava_files, our_llava, save
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from covft.checkpoints.run import load_start


def start(model, path):
    load_start(model, Config(dict(load_from=str(path))))


def test_a_stage_that_was_killed(tmp_path):
    torch.save({"state_dict": {}, "meta": {}}, tmp_path / "iter_3.pth")
    with pytest.raises(FileNotFoundError, match=r"isn't finished.*iter_\*"):
        start(our_llava(), tmp_path)


def test_a_run_that_was_killed(tmp_path):
    (tmp_path / "config.py").write_text("model = dict()\n")
    with pytest.raises(FileNotFoundError, match="isn't finished"):
        start(our_llava(), tmp_path)


def test_deepspeed(tmp_path):
    trained, model = llava_files()["llava"], our_llava()
    # What DeepSpeed writes beside the weights, by its engine's save_checkpoint.
    states = dict(
        module=trained,
        buffer_names=[],
        optimizer=None,
        param_shapes=[{name: value.shape for name, value in trained.items()}],
        sparse_tensor_module_names=set(),
        ds_config=dict(zero_optimization=dict(stage=2)),
        global_steps=3,
    )
    torch.save(states, tmp_path / "mp_rank_00_model_states.pt")
    table = trained["model.embed_tokens.weight"]
    for path in (tmp_path, tmp_path / "mp_rank_00_model_states.pt"):
        model = our_llava()
        start(model, path)
        assert torch.equal(model.llm.model.model.embed_tokens.weight, table)


def test_partitions_of_zero_3(tmp_path):
    file = tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save({"module": {"model.embed_tokens.weight": torch.empty(0)}}, file)
    for path in (tmp_path, file):
        with pytest.raises(ValueError, match=r"ZeRO-3.*zero_to_fp32\.py"):
            start(our_llava(), path)


def part_alone(kind):
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(size, image_size=16, patch_size=8)
    if kind == "llm":
        return LlamaForCausalLM(LlamaConfig(**size, vocab_size=20))
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**vision))
    if kind == "siglip":
        return SiglipVisionModel(SiglipVisionConfig(**vision))
    return InternVLVisionModel(InternVLVisionConfig(**size, image_size=[16, 16], patch_size=[8, 8]))


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("llm", r"model\.llm\.weights"),
        ("clip", r"model\.vision\.backbone\.weights"),
        ("siglip", r"model\.vision\.backbone\.weights"),
        ("internvit", r"model\.vision\.backbone\.weights"),
    ],
)
def test_a_part_alone(kind, key, tmp_path):
    part_alone(kind).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match=f"alone, not a whole MLLM; .*set {key} to that"):
            start(our_llava(), path)


def test_internvit_alone_by_its_authors_names(tmp_path):
    names = ("embeddings.class_embedding", "embeddings.patch_embedding.weight")
    save(tmp_path, {name: torch.ones(2) for name in names})
    with pytest.raises(ValueError, match="holds a vision encoder alone"):
        start(our_llava(), tmp_path)
