"""Checkpointing policies: what is recomputed, that gradients stay, and how much is kept."""

import pytest
import torch
from miniature import ARCH
from torch import nn

from covft.models import CausalLM
from covft.models.checkpointing import CheckpointedBlock, CheckpointingPolicy, saved_bytes
from covft.models.vision import Block, ViT, ViTConfig
from covft.vft.covft import CoVFT

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
#: Settings, and how many of four blocks run twice.
SETTINGS = {
    "none": (False, 0),
    "full": ("full", 4),
    "true": (True, 4),
    "selective": ("selective", 4),
    "half": (0.5, 2),
    "quarter": (0.25, 1),
    "large budget": ({"budget_gb": 1}, 0),
    "no budget": ({"budget_gb": 1e-9}, 4),
}
PACKED = {
    "attention_mask": None,
    "position_ids": torch.cat([torch.arange(9), torch.arange(7)])[None],
    "cu_seqlens": torch.tensor([0, 9, 16], dtype=torch.int32),
}


def randomise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.double().train()


def vit(setting, **changes) -> ViT:
    torch.manual_seed(0)
    config = ViTConfig(**{**ARCH, "depth": 4, "drop_path": 0.4, "layer_scale": 0.5, **changes})
    return randomise(ViT(config, checkpointing=setting))


def llm(setting, **options) -> CausalLM:
    torch.manual_seed(0)
    return randomise(CausalLM(arch=LLAMA, checkpointing=setting, dtype="float64", **options))


def vit_step(model: ViT) -> torch.Tensor:
    torch.manual_seed(5)
    return model(torch.randn(3, 3, 32, 32, dtype=torch.float64)).square().sum()


def llm_step(model: CausalLM, *, packed: bool = True) -> torch.Tensor:
    torch.manual_seed(5)
    embeds = torch.randn(1, 16, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 16, dtype=torch.bool)
    return model.hidden_states(embeds, **(PACKED if packed else {"attention_mask": mask})).sum()


pytestmark = pytest.mark.filterwarnings("ignore:.*more than the budget")
CASES = {
    "vit": (vit, vit_step),
    "llm, packed": (llm, llm_step),
    "llm, padded": (llm, lambda model: llm_step(model, packed=False)),
}


def count_runs(model: nn.Module) -> list[int]:
    """Count the runs of the MLPs: one per block, and one more where it is recomputed."""
    calls: list[int] = []
    layers = model.layers if isinstance(model, CausalLM) else model.blocks
    norm = "input_layernorm" if isinstance(model, CausalLM) else "norm1"
    for index, layer in enumerate(layers):
        getattr(layer, norm).register_forward_hook(lambda *_, index=index: calls.append(index))
    return calls


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_equal_and_as_many_blocks_run_twice(name, case):
    setting, recomputed = SETTINGS[name]
    build, step = CASES[case]
    plain, model = build(False), build(setting)
    step(plain).backward()
    step(model).backward()  # a budget measures here
    model.zero_grad()
    calls = count_runs(model)
    loss = step(model)
    assert len(calls) == 4
    loss.backward()
    assert len(calls) == 4 + recomputed
    for (key, one), two in zip(plain.named_parameters(), model.parameters(), strict=True):
        if one.grad is None:
            assert two.grad is None and ("embed_tokens" in key or "lm_head" in key)
        else:
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-12, atol=1e-12, msg=key)


def kept(model: nn.Module, step) -> int:
    step(model).backward()
    return saved_bytes(lambda: step(model), excluded=model.parameters())


@pytest.mark.parametrize("case", ["vit", "llm, packed"])
def test_what_is_kept_falls_with_the_policy(case):
    build, step = CASES[case]
    found = {name: kept(build(setting), step) for name, (setting, _) in SETTINGS.items()}
    assert found["full"] == found["true"] == found["no budget"]
    assert found["large budget"] == found["none"]
    assert found["full"] < found["half"] < found["quarter"] < found["none"]


@pytest.mark.parametrize("case", ["vit", "llm, packed"])
def test_a_budget_is_kept_with_as_few_recomputed_blocks_as_possible(case):
    build, step = CASES[case]
    for share in (0.3, 0.5, 0.8):
        everything = kept(build(False), step)
        budget = share * everything
        model = build({"budget_gb": budget / 1e9})
        found = kept(model, step)
        # What is outside the blocks isn't part of the budget.
        outside = kept(build(True), step)
        per_block = (everything - outside) / 4
        assert found <= budget + outside
        assert found > budget - outside - per_block


def test_a_budget_follows_the_number_of_tokens():
    policy = CheckpointingPolicy({"budget_gb": 1e-9 * 900}, where="checkpointing")
    policy._per_token = [(10.0, 1.0)] * 4
    blocks = [nn.Identity()] * 4
    recomputed = {}
    for tokens in (10, 22, 23, 50, 225):
        with policy.modes(blocks, torch.zeros(1, tokens, 8)) as modes:
            recomputed[tokens] = sum(mode == "full" for mode in modes)
            assert modes == sorted(modes, key=lambda mode: mode is None)  # the last ones are kept
    assert recomputed == {10: 0, 22: 0, 23: 1, 50: 3, 225: 4}
    with (
        pytest.warns(UserWarning, match="more than the budget"),
        policy.modes(blocks, torch.zeros(1, 300, 8)) as modes,
    ):
        assert modes == ["full"] * 4


def test_measuring_leaves_no_trace():
    torch.manual_seed(0)
    model = vit({"budget_gb": 1})
    plain = vit(False)
    first = vit_step(model)
    drawn = torch.rand(1)
    assert torch.equal(first, vit_step(plain)) and torch.equal(drawn, torch.rand(1))
    assert not any(block._forward_pre_hooks for block in model.blocks)


def test_a_forward_without_images_measures_nothing():
    model = vit({"budget_gb": 1})
    model(torch.zeros(0, 3, 32, 32, dtype=torch.float64)).sum().backward()
    vit_step(model).backward()
    vit_step(model)
    assert [block.mode for block in model.blocks] == [None] * 4


class Wrapper(nn.Module):
    """What a method of one's own may put in a block's place."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x, context, rope=None):
        return self.block(x, context, rope) * 2


@pytest.mark.parametrize("setting", [True, "selective", {"budget_gb": 1e-9}])
def test_other_modules_in_a_blocks_place_are_recomputed_too(setting):
    models = [vit(False), vit(setting)]
    for model in models:
        model.blocks[1] = Wrapper(model.blocks[1])
        vit_step(model).backward()
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-12, atol=1e-12)
    calls = []
    models[1].blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    vit_step(models[1]).backward()
    assert len(calls) == 2


def test_selective_keeps_matrix_products():
    model = vit("selective")
    products = []
    linear = torch.ops.aten.addmm.default

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products.append(func)
            return func(*args, **(kwargs or {}))

    loss = vit_step(model)
    with Count():
        loss.backward()
    assert linear not in products and torch.ops.aten.native_layer_norm.default in products


def test_comoe_recompute_and_selective_exclude_each_other():
    from covft_miniature import make_tower

    tower = make_tower(recompute=True).train()
    tower.backbone.checkpointing = "selective"
    context = None
    assert isinstance(tower.vft, CoVFT)
    with pytest.raises(ValueError, match=r"vft\.recompute"):
        tower(torch.zeros(1, 3, 32, 32), context)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("ful", "full"),
        (1.0, "share"),
        (0, "share"),
        (2, "share"),
        ({"budget": 3}, "budget_gb"),
        ({"budget_gb": 0}, "budget_gb"),
        ({"budget_gb": True}, "budget_gb"),
        (None, "share"),
    ],
)
def test_wrong_settings(setting, words):
    with pytest.raises(ValueError, match=words):
        CheckpointingPolicy(setting, where="model.llm.checkpointing")


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_share_that_is_none_or_all_is_refused(share):
    with pytest.raises(ValueError, match=r"use (True|False), or a share of at least 0.125"):
        vit_step(vit(share))


def test_the_setting_can_be_changed():
    model = vit(True)
    vit_step(model).backward()
    model.checkpointing = "none"
    assert model.checkpointing is False
    vit_step(model)
    assert all(isinstance(b, CheckpointedBlock) and b.mode is None for b in model.blocks)


def test_llms_without_such_layers_are_refused(monkeypatch):
    monkeypatch.setattr(CausalLM, "layers", [])
    with pytest.raises(ValueError, match=r"model\.llm\.checkpointing"):
        llm(True)
