"""LLMs from folders as their authors published them."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import phi3_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from covft.models.llm import Phi3, Vicuna

SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [2.0, 3.0, 4.0, 5.0]
FIELDS = dict(
    model_type="phi3",
    architectures=["Phi3ForCausalLM"],
    auto_map={
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    vocab_size=420,
    max_position_embeddings=131072,
    original_max_position_embeddings=4096,
    rope_theta=10000.0,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    torch_dtype="bfloat16",
)
SU = dict(type="su", short_factor=SHORT, long_factor=LONG)


def publish(folder, *, config: dict, prefix: str = "", extra: tuple[str, ...] = ()):
    """Write a folder as on the hub; return the LLM that transformers makes of the same weights."""
    torch.manual_seed(0)
    longrope = {**SU, "rope_type": "longrope"}
    longrope.pop("type")
    fields = AutoConfig.for_model(**{**FIELDS, "rope_scaling": longrope})
    model = AutoModelForCausalLM.from_config(fields, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    phi3_tokenizer().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state = {prefix + name: tensor for name, tensor in state.items()}
    state |= {name: torch.zeros(2) for name in extra}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return model


def check_equal(llm: Phi3, reference) -> None:
    rope = llm.model.model.rotary_emb
    assert rope.rope_type == "longrope"
    expected = [1 / (factor * 10000 ** (2 * i / 8)) for i, factor in enumerate(SHORT)]
    torch.testing.assert_close(rope.inv_freq, torch.tensor(expected))
    # Phi-3's own formula, for 131072 positions after a training on 4096.
    scaling = math.sqrt(1 + math.log(131072 / 4096) / math.log(4096))
    assert rope.attention_scaling == pytest.approx(scaling)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(llm.model(ids).logits, reference(ids).logits)
    assert llm.tokenizer.convert_tokens_to_ids("<img>") == 404


def test_su_is_longrope(tmp_path) -> None:
    reference = publish(tmp_path, config={**FIELDS, "rope_scaling": SU})
    check_equal(Phi3(weights=str(tmp_path)).eval(), reference)


def test_the_llm_of_a_whole_internvl2(tmp_path) -> None:
    config = {
        "model_type": "internvl_chat",
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "llm_config": {**FIELDS, "rope_scaling": SU},
        "vision_config": {"model_type": "intern_vit_6b"},
    }
    extra = ("vision_model.embeddings.class_embedding", "mlp1.0.weight")
    reference = publish(tmp_path, config=config, prefix="language_model.", extra=extra)
    check_equal(Phi3(weights=str(tmp_path)).eval(), reference)
    tokenizer = Phi3(arch=FIELDS, tokenizer=str(tmp_path)).tokenizer
    assert tokenizer("<img>a</img>")["input_ids"][-1] == 405


def test_missing_weights_are_an_error(tmp_path) -> None:
    publish(tmp_path, config={**FIELDS, "rope_scaling": SU})
    state = load_file(tmp_path / "model.safetensors")
    state.pop("model.norm.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of the phi3 .* 'model.norm.weight'"):
        Phi3(weights=str(tmp_path))


def test_a_folder_without_config(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"holds no LLM: it has no config.json"):
        Phi3(weights=str(tmp_path))


def test_another_vocabulary_than_the_configs(tmp_path) -> None:
    publish(tmp_path, config={**FIELDS, "rope_scaling": SU, "vocab_size": 430})
    with pytest.raises(
        ValueError, match=r"of shape \(420, 32\), but its config.json .*\(430, 32\)"
    ):
        Phi3(weights=str(tmp_path))


def test_another_family_than_the_class(tmp_path) -> None:
    publish(tmp_path, config={**FIELDS, "rope_scaling": SU})
    with pytest.raises(ValueError, match=r"holds a phi3, Vicuna expects llama; change model.llm"):
        Vicuna(weights=str(tmp_path))
