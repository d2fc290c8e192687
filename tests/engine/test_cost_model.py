"""What packing takes samples to cost, against the count of operations."""

import pytest
import torch
from covft_miniature import make_mllm

from covft.datasets import CostModel
from covft.engine.flops import FlopModel, Work, cost, cost_model


@pytest.mark.parametrize("frozen", [(), ("llm",), ("llm", "vision", "projector"), ("vision",)])
def test_costs_are_the_counted_operations(tiny_options, frozen):
    model = make_mllm(tiny_options, num_experts=2, first_block=2)
    for part in frozen:
        getattr(model, part).requires_grad_(False)
    flops = FlopModel(model)
    for tokens, squares in ((1, 0), (50, 1), (700, 3)):
        parts = flops.parts(Work((tokens,), 0, image_texts=(32,) * squares))
        expected = sum(parts[name].total for name in ("llm", "vision", "projector"))
        (found,) = cost_model(model).costs([tokens], [squares])
        assert found == pytest.approx(expected, rel=1e-12)


def test_costs_of_the_llm_by_hand(tiny_options):
    model = make_mllm(tiny_options, num_experts=2, first_block=2)
    # A Llama of width 32 and depth 2, its MLP 64 wide: q, k, v, o and three matrices of the MLP.
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    trained = cost_model(model)
    assert trained.per_token == 3 * 2 * weights
    assert trained.per_pair == 3 * 0.5 * 4 * 2 * 32
    model.llm.requires_grad_(False)
    frozen = cost_model(model)
    assert frozen.per_token == 2 * 2 * weights  # gradients still pass on to the vision encoder
    assert frozen.per_square == trained.per_square
    model.requires_grad_(False)
    assert cost_model(model).per_token == 2 * weights
    assert cost_model(model).per_square < 0.5 * trained.per_square


def test_a_model_that_cannot_be_counted_is_packed_by_tokens(tiny_options, monkeypatch):
    said = []
    monkeypatch.setattr(cost, "print_log", lambda text, **_: said.append(text))
    model = make_mllm(tiny_options, num_experts=2, first_block=2)
    model.projector.register_parameter("odd", torch.nn.Parameter(torch.zeros(3)))
    assert cost_model(model) == CostModel()
    assert len(said) == 1
    assert "packing balances tokens alone" in said[0] and "odd" in said[0]
