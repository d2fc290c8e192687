"""The optimizer wrapper over sharded parameters, and norms of 16-bit gradients."""

from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from covft.engine import AutocastOptimWrapper, build_optim_wrapper
from covft.engine.optim_wrapper import checked_precision


class Parts(nn.Module):
    """Two parts of a model, of types of their own."""

    def __init__(self, vision: torch.dtype, llm: torch.dtype) -> None:
        super().__init__()
        self.vision = nn.Linear(31, 17, dtype=vision)
        self.llm = nn.Linear(13, 11, dtype=llm)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    distributed.destroy_process_group()


def sharded(local: torch.Tensor, mesh: DeviceMesh) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(DTensor.from_local(local, mesh))
    return model


def wrapper_of(model: nn.Module, **cfg) -> AutocastOptimWrapper:
    return build_optim_wrapper(model, {"optimizer": {"type": "SGD", "lr": 1e-4}, **cfg})


@pytest.mark.parametrize("is_native", [True, False])
def test_offloaded_shards_are_computed_with_on_their_mesh(mesh, monkeypatch, is_native) -> None:
    """As CPU offload keeps a GPU's shards on the CPU, here meta keeps the CPU's."""
    monkeypatch.setattr(
        "covft.engine.optim_wrapper.has_native_bf16", lambda kind: is_native and kind == "cpu"
    )
    model = sharded(torch.ones(3, 4, device="meta"), mesh)
    assert model.weight.device.type == "meta"
    wrapper = wrapper_of(model)
    assert wrapper.device_type == "cpu"
    assert wrapper.precision == checked_precision("auto", "cpu") == ("fp32", "bf16")[is_native]
    with wrapper.micro_batch(model, last=True):
        assert torch.is_autocast_enabled("cpu") is is_native


def test_the_warning_of_lost_updates_names_no_optimizer_that_shards_refuse(
    mesh, monkeypatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("covft.engine.optimizer.print_log", lambda text, **_: said.append(text))
    wrapper_of(sharded(torch.ones(20, dtype=torch.bfloat16), mesh))
    (text,) = said
    assert "20 weights" in text and "float32 weights" in text and "BF16AdamW" not in text


@pytest.mark.parametrize(
    ("vision", "llm"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float64),
    ],
)
def test_norms_are_at_least_as_precise_as_float32(vision, llm) -> None:
    torch.manual_seed(0)
    model = Parts(vision, llm)
    model.llm.bias.data = model.llm.bias.data.bfloat16()  # two types in one part
    wrapper = wrapper_of(model, clip_grad={"max_norm": 0.5})
    squares = dict.fromkeys(("vision", "llm"), 0.0)
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn_like(parameter)
        squares[name.split(".")[0]] += float(parameter.grad.double().square().sum())
    norm = wrapper.clip_gradients()
    exact = {name: square**0.5 for name, square in squares.items()}
    assert wrapper.module_norms() == pytest.approx(exact, rel=1e-6)
    assert float(norm) == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-6)
    assert float(wrapper.clip_gradients()) == pytest.approx(0.5, rel=2e-3)


def test_the_norm_of_float64_gradients_is_float64() -> None:
    model = Parts(torch.float64, torch.float64)
    wrapper = wrapper_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1 / 3)
    count = sum(p.numel() for p in model.parameters())
    norm = wrapper.clip_gradients()
    assert norm.dtype == torch.float64
    assert float(norm) == pytest.approx(count**0.5 / 3, rel=1e-14)
