import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from covft.models import lm_loss
from covft.models.llm import CausalLM
from covft.models.llm_adapters import LoRAOptions, LowRankUpdate
from covft.models.lm_loss import (
    OutputLayer,
    as_output_layer,
    cross_entropy_sum,
    supervised_loss,
)

WIDTH, WORDS, ROWS = 6, 11, 10


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks, the last one shorter."""
    monkeypatch.setattr(lm_loss, "_chunk_rows", lambda vocabulary: 4)


def layer(dtype=torch.float64, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, WORDS, bias=bias, dtype=dtype)


def inputs(dtype=torch.float64, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    states = 3 * torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(WORDS, (rows,), generator=generator)
    return states.to(dtype).requires_grad_(), targets


def plain_loss(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(states), targets, reduction="sum")


def gradients(loss: Tensor, head: nn.Module, states: Tensor) -> list[Tensor]:
    learnt = [states, *(p for p in head.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(0.37 * loss, learnt))


def assert_like_plain(head: nn.Module, states: Tensor, targets: Tensor) -> None:
    loss, expected = (f(head, states, targets) for f in (supervised_loss, plain_loss))
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    found, wanted = gradients(loss, head, states), gradients(expected, head, states)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, ROWS])
def test_loss_and_gradients_are_exact(bias: bool, rows: int) -> None:
    head = layer(bias=bias)
    as_output_layer(head)
    assert type(head) is OutputLayer
    assert_like_plain(head, *inputs(rows=rows))


def test_logits_are_those_of_a_linear_layer() -> None:
    head, states = layer(bias=True), inputs()[0]
    expected = head(states[None])
    as_output_layer(head)
    assert head(states[None]).equal(expected)
    assert list(head.state_dict()) == ["weight", "bias"]


def test_large_logits_are_finite() -> None:
    head, (states, targets) = layer(), inputs()
    as_output_layer(head)
    assert_like_plain(head, (1e4 * states.detach()).requires_grad_(), targets)


def test_a_frozen_layer_gets_no_gradient_and_none_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = layer()
    as_output_layer(head)
    head.requires_grad_(False)
    made: list[bool] = []
    made_by = lm_loss._Gradients.__init__

    def spy(self, *args) -> None:
        made_by(self, *args)
        made.append(self._weight_dtype is not None)

    monkeypatch.setattr(lm_loss._Gradients, "__init__", spy)
    states, targets = inputs()
    assert_like_plain(head, states, targets)
    head.requires_grad_(True)
    supervised_loss(head, states.detach(), targets).backward()
    with torch.no_grad():
        supervised_loss(head, states, targets)
    assert made == [False, True, False]


def test_evaluation_without_gradients() -> None:
    head, (states, targets) = layer(), inputs()
    as_output_layer(head)
    with torch.no_grad():
        loss = supervised_loss(head, states, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain_loss(head, states, targets).detach())


@pytest.mark.parametrize("plain", [True, False])
def test_no_supervised_position_is_a_loss_of_zero_with_gradients(plain: bool) -> None:
    head: nn.Module = layer(bias=True)
    if plain:
        as_output_layer(head)
    else:
        head = nn.Sequential(head, nn.Identity())
    states, targets = inputs(rows=0)
    loss = supervised_loss(head, states, targets)
    assert loss == 0
    found = gradients(loss, head, states)
    assert [tuple(grad.shape) for grad in found] == [(0, WIDTH), (WORDS, WIDTH), (WORDS,)]
    assert not any(grad.any() for grad in found)


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def lora_layer() -> nn.Module:
    head = nn.Linear(WIDTH, WORDS, bias=False, dtype=torch.float64).requires_grad_(False)
    adapted: nn.Module = head
    adapted.__class__ = type("LoRALinear", (LowRankUpdate, nn.Linear), {})
    adapted.add_update(LoRAOptions(rank=2, dropout=0.0), dtype=torch.float64)
    nn.init.normal_(adapted.lora_b)
    return adapted


OTHERS = {
    "a subclass": lambda: Scaled(WIDTH, WORDS, dtype=torch.float64),
    "several layers": lambda: nn.Sequential(layer(), nn.Tanh()),
    "LoRA": lora_layer,
    "a parametrisation": lambda: nn.utils.parametrizations.weight_norm(layer()),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_layers_are_called(make) -> None:
    head = make()
    kind = type(head)
    as_output_layer(head)
    assert type(head) is kind
    assert_like_plain(head, *inputs())


def test_tied_embeddings_get_both_gradients() -> None:
    table = nn.Embedding(WORDS, WIDTH, dtype=torch.float64)
    head = layer()
    as_output_layer(head)
    head.weight = table.weight
    ids, targets = torch.arange(ROWS), inputs()[1]
    found = []
    for loss in (supervised_loss, plain_loss):
        table.weight.grad = None
        loss(head, table(ids).sin(), targets).backward()
        assert table.weight.grad is not None
        found.append(table.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_a_second_backward_pass_is_an_error() -> None:
    head, (states, targets) = layer(), inputs()
    as_output_layer(head)
    loss = supervised_loss(head, states, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_recomputed_under_checkpointing() -> None:
    head, (states, targets) = layer(), inputs()
    as_output_layer(head)
    loss = checkpoint(supervised_loss, head, states, targets, use_reentrant=False)
    expected = plain_loss(head, states, targets)
    for one, other in zip(
        gradients(loss, head, states), gradients(expected, head, states), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_autocast_computes_products_in_16_bits_and_softmax_in_32() -> None:
    head, (states, targets) = layer(torch.float32), inputs(torch.float32)
    as_output_layer(head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = supervised_loss(head, states, targets)
        assert head(states).dtype == torch.bfloat16
        expected = F.cross_entropy(head(states).float(), targets, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    found, wanted = gradients(loss, head, states), gradients(expected, head, states)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        # Plain autograd rounds the weight's gradient to bfloat16, ours only each chunk's.
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_bfloat16_weights_have_a_float32_loss() -> None:
    head, (states, targets) = layer(torch.bfloat16), inputs(torch.bfloat16)
    as_output_layer(head)
    loss = supervised_loss(head, states, targets)
    expected = F.cross_entropy(head(states).float(), targets, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    for one, other in zip(
        gradients(loss, head, states), gradients(expected, head, states), strict=True
    ):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_as_many_rows_as_asked_for() -> None:
    head, (states, targets) = layer(), inputs()
    losses = [
        cross_entropy_sum(states, head.weight, None, targets, chunk_rows=rows)
        for rows in (1, 3, 50)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-13, atol=0)
    torch.testing.assert_close(losses[1], losses[2], rtol=1e-13, atol=0)


def test_chunks_fit_any_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [lm_loss._chunk_rows(words) for words in (100, 32_000, 152_000, 10**7)] == [
        335_488,
        1024,
        128,
        128,
    ]


def test_an_llm_takes_its_loss_here() -> None:
    arch = {
        "model_type": "llama",
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    llm = CausalLM(arch=arch)
    assert type(llm.model.get_output_embeddings()) is OutputLayer
    states, targets = inputs(torch.float32)
    torch.testing.assert_close(
        llm.loss_sum(states, targets), F.cross_entropy(llm.logits(states), targets, reduction="sum")
    )
    assert type(AutoModelForCausalLM.from_config(AutoConfig.for_model(**arch)).lm_head) is nn.Linear
