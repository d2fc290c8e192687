"""LoRA and 4-bit weights of the LLM."""

import sys

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from covft.checkpoints.trainable import load_weights, save_weights, trainable_state_dict
from covft.models.llm import CausalLM

torch.set_num_threads(1)
LLAMA = dict(
    model_type="llama",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
)
PHI3 = {**LLAMA, "model_type": "phi3", "pad_token_id": 0}
QWEN2 = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}
LORA = dict(rank=4, alpha=8, dropout=0.0)
LLAMA_LINEARS = {
    f"layers.{layer}.{name}"
    for layer in range(2)
    for name in (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
}


def needs_bitsandbytes():
    return pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes isn't installed: pip install 'covft[train]'"
    )


def llm(arch=LLAMA, **options) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(arch=arch, **options)


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.1 * noise + (parameter.ndim == 1))
    return model


def states(model: CausalLM, dtype=torch.float64) -> torch.Tensor:
    ids = torch.arange(14).view(2, 7) * 5 % 96
    embeds = model.embed(ids).to(dtype)
    return model.logits(model.hidden_states(embeds, torch.ones(2, 7, dtype=torch.bool)))


def adapted(model: CausalLM) -> set[str]:
    return {
        name.removeprefix("model.model.").removesuffix(".lora_a")
        for name, _ in model.named_parameters()
        if name.endswith("lora_a")
    }


def test_every_linear_layer_but_the_output_layer_is_adapted():
    model = llm(lora=LORA)
    assert adapted(model) == LLAMA_LINEARS
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {
        f"model.model.{path}.{leaf}" for path in LLAMA_LINEARS for leaf in ("lora_a", "lora_b")
    }
    assert trained == expected == set(trainable_state_dict(model))
    shapes = dict(model.named_parameters())
    assert shapes["model.model.layers.0.self_attn.k_proj.lora_a"].shape == (4, 64)
    assert shapes["model.model.layers.0.self_attn.k_proj.lora_b"].shape == (32, 4)


def test_defaults_are_those_of_llava():
    with torch.device("meta"):
        model = llm(lora={})
    layer = model.model.model.layers[0].mlp.up_proj
    assert layer.lora_a.shape == (128, 64) and layer.lora_scale == 2.0
    assert layer.lora_dropout.p == 0.05


def test_count_on_vicuna_7b():
    """7 layers of 32 blocks at rank 128, as peft counts them for LLaVA's recipe."""
    from covft.models.llm import Vicuna

    with torch.device("meta"):
        model = Vicuna(arch="7b", lora=dict(rank=128, alpha=256))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008)) == 319_815_680


def test_named_targets_and_fused_projections():
    model = llm(lora=dict(**LORA, target=("q_proj", "down_proj")))
    assert {path.rpartition(".")[2] for path in adapted(model)} == {"q_proj", "down_proj"}
    model = llm(PHI3, lora=LORA)
    parts = {path.rpartition(".")[2] for path in adapted(model)}
    assert parts == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_adapted_model_starts_as_the_pretrained_one_and_keeps_its_names():
    plain, model = llm(dtype="float64"), llm(lora=LORA, dtype="float64")
    randomised(plain)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(".lora_" in name for name in missing)
    assert torch.equal(states(model), states(plain))


@pytest.mark.parametrize("arch", [LLAMA, PHI3, QWEN2], ids=lambda arch: arch["model_type"])
def test_merged_weights_make_a_plain_model_with_the_same_logits(arch):
    model = randomised(llm(arch, lora=LORA, dtype="float64")).eval()
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**arch), dtype=torch.float64)
    merged = model.merged_state_dict()
    assert set(merged) == set(plain.state_dict())
    plain.load_state_dict(merged)
    theirs = CausalLM(arch=arch, dtype="float64").eval()
    theirs.model = plain.eval()
    assert torch.allclose(states(model), states(theirs), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.zero_()
    assert not torch.allclose(states(model), states(theirs), rtol=1e-3)


def test_plain_model_merges_to_itself():
    model = llm(QWEN2)
    merged = model.merged_state_dict()
    assert merged.keys() == model.model.state_dict().keys()
    assert all(torch.equal(value, merged[name]) for name, value in model.model.state_dict().items())


def test_updates_are_float32_beside_16_bit_weights_and_merge_before_rounding():
    model = llm(lora=LORA, dtype="bfloat16")
    layer = randomised(model).model.model.layers[1].mlp.gate_proj
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_a.dtype == torch.float32
    assert states(model, torch.bfloat16).dtype == torch.bfloat16
    exact = layer.weight.double() + 2 * layer.lora_b.double() @ layer.lora_a.double()
    merged = model.merged_state_dict()["model.layers.1.mlp.gate_proj.weight"]
    assert merged.dtype == torch.bfloat16
    assert ((merged - exact).abs() <= exact.abs() * (2**-8 * 1.001)).all()  # rounded once


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_updates_alone_get_gradients_under_checkpointing_and_autocast(quantization):
    if quantization:
        needs_bitsandbytes()
    model = llm(lora=LORA, quantization=quantization, checkpointing=True).train()
    randomised_updates(model)
    inputs = torch.randn(2, 5, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.logits(
            model.hidden_states(inputs, torch.ones(2, 5, dtype=torch.bool))
        ).sum().backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name


def randomised_updates(model: CausalLM) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape))


def test_dropout_acts_in_training_only():
    model = llm(lora=dict(rank=4, alpha=8, dropout=0.5), dtype="float64")
    randomised(model)
    assert not torch.equal(states(model.train()), states(model))
    assert torch.equal(states(model.eval()), states(model))


def test_equal_to_peft():
    peft = pytest.importorskip("peft", reason="peft isn't installed: pip install peft")
    model = randomised(llm(lora=LORA, dtype="float64")).eval()
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA), dtype=torch.float64)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    reference = peft.get_peft_model(reference, config).eval()
    theirs = {}
    for name, value in model.model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf.startswith("lora_"):
            name = f"{owner}.lora_{leaf[-1].upper()}.default.weight"
        elif owner.removeprefix("model.") in LLAMA_LINEARS:
            name = f"{owner}.base_layer.{leaf}"
        theirs[f"base_model.model.{name}"] = value
    reference.load_state_dict(theirs)
    ids = torch.arange(14).view(2, 7) * 5 % 96
    expected = reference(inputs_embeds=model.embed(ids)).logits
    assert torch.allclose(states(model), expected, rtol=1e-10, atol=1e-12)


def test_file_of_weights_holds_the_updates_and_loads_again(tmp_path):
    model = llm(lora=LORA)
    randomised_updates(model)
    save_weights(model, tmp_path / "weights.safetensors", metadata={})
    other = llm(lora=LORA)
    names = load_weights(other, tmp_path / "weights.safetensors")
    assert len(names) == 2 * len(LLAMA_LINEARS) and all(".lora_" in name for name in names)
    assert torch.equal(states(other, torch.float32), states(model, torch.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lora=dict(rank=0)), r"llm\.lora\.rank must be at least 1, got 0"),
        (dict(lora=dict(alpha=0)), r"llm\.lora\.alpha must be above 0"),
        (dict(lora=dict(dropout=1.0)), r"llm\.lora\.dropout must be in \[0, 1\)"),
        (dict(lora=dict(r=8)), r"'llm\.lora' takes no argument 'r'; did you mean|known: alpha"),
        (dict(lora=dict(target="q_proj")), r"target must be a list of layer names, got 'q_proj'"),
        (dict(lora=dict(target=[])), "leave it out to adapt every linear layer"),
        (dict(lora=dict(target=["q_prj"])), "called 'q_prj'; did you mean 'q_proj'"),
        (dict(lora=dict(target=["lm_head"])), "no linear layer is called 'lm_head'"),
        (dict(lora=LORA, freeze=True), r"llm\.freeze=True and llm\.lora exclude each other"),
        (dict(lora=LORA, freeze_embeddings=True), "freeze_embeddings=True and llm.lora exclude"),
        (dict(quantization="nf5", lora=LORA), "'nf5' is unknown; did you mean 'nf4'"),
        (dict(quantization="nf4"), r"add llm\.lora=.*or set llm\.freeze=True"),
    ],
)
def test_wrong_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        llm(**options)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"quantization='nf4' needs .*pip install bitsandbytes"):
        llm(quantization="nf4", lora=LORA)
    assert llm(lora=LORA).hidden_dim == 64


def test_nf4_keeps_frozen_weights_in_four_bits():
    bitsandbytes = needs_bitsandbytes()
    model = llm(quantization="nf4", freeze=True, dtype="bfloat16")
    layers = dict(model.model.model.named_modules())
    for path in LLAMA_LINEARS:
        layer = layers[path]
        assert isinstance(layer, bitsandbytes.nn.Linear4bit), path
        assert layer.weight.dtype == torch.uint8 and layer.compute_dtype == torch.bfloat16
        assert layer.weight.numel() * 2 == layer.in_features * layer.out_features
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
    assert not isinstance(model.model.lm_head, bitsandbytes.nn.Linear4bit)
    assert model.model.lm_head.weight.dtype == torch.bfloat16
    assert trainable_state_dict(model) == {}
    assert not any(p.requires_grad for p in model.parameters())


def test_nf4_error_is_that_of_four_bits():
    """NF4's relative error on normal weights is about 9 %; int4's would be larger."""
    needs_bitsandbytes()
    exact, model = llm().merged_state_dict(), llm(quantization="nf4", freeze=True)
    for name, value in model.merged_state_dict().items():
        error = (value - exact[name]).norm() / exact[name].norm()
        quantised = name.removeprefix("model.").removesuffix(".weight") in LLAMA_LINEARS
        assert (0.05 < error < 0.12) if quantised else error == 0, name


@pytest.mark.parametrize("arch", [LLAMA, QWEN2], ids=lambda arch: arch["model_type"])
def test_qlora_merges_to_a_plain_model_with_the_same_states(arch):
    needs_bitsandbytes()
    model = llm(arch, quantization="nf4", lora=LORA).eval()
    randomised_updates(model)
    plain = CausalLM(arch=arch).eval()
    plain.model.load_state_dict(model.merged_state_dict())
    ours, theirs = states(model, torch.float32), states(plain, torch.float32)
    # The quantised layers' products are rounded to bfloat16.
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.999
    untouched = llm(arch).eval()
    far = states(untouched, torch.float32)
    assert torch.nn.functional.cosine_similarity(ours, far, dim=-1).min() < 0.99


def test_qlora_trains_saves_and_loads(tmp_path):
    needs_bitsandbytes()
    model = llm(quantization="nf4", lora=LORA).train()
    ids = torch.arange(12).view(2, 6)

    def loss():
        logits = model.logits(model.hidden_states(model.embed(ids), torch.ones(2, 6).bool()))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = model.model.model.layers[0].mlp.up_proj.weight.clone()
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    first = float(loss().detach())
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < 0.8 * first
    assert torch.equal(frozen, model.model.model.layers[0].mlp.up_proj.weight)
    save_weights(model, tmp_path / "weights.safetensors", metadata={})
    assert len(trainable_state_dict(model)) == 2 * len(LLAMA_LINEARS)
    other = llm(quantization="nf4", lora=LORA)
    load_weights(other, tmp_path / "weights.safetensors")
    assert torch.equal(states(other.eval(), torch.float32), states(model.eval(), torch.float32))


def test_quantised_model_builds_on_the_meta_device():
    needs_bitsandbytes()
    with torch.device("meta"):
        model = llm(quantization="nf4", lora=LORA)
        plain = llm()
    count = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
    assert count == sum(p.numel() for p in plain.parameters())
    assert all(p.device.type == "meta" for p in model.parameters())
