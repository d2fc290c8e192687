"""One interface to the optimizer under every engine: precision, accumulation, clipping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from covft.registry import OPTIM_WRAPPERS, nearest

PRECISIONS = ("auto", "bf16", "fp32")
#: Ending of the names of parameter groups that weight decay leaves alone.
NO_DECAY = ".no_decay"
_NARROW = (torch.bfloat16, torch.float16)


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """An optimizer with bf16 autocast on any device and clipping of the global gradient norm.

    The loop calls, for every step, ``micro_batch`` and ``backward`` once per micro-batch, then
    ``clip_gradients``, ``step`` and ``zero_grad``. Gradients are averaged over the processes when
    the last backward of a step is done.

    Args:
        optimizer: The optimizer, with named groups of named parameters.
        precision: "bf16" or "fp32" for the forward; "auto" takes bf16 where it is native.
        clip_grad: ``dict(max_norm=...)``, or None to leave gradients alone.

    Raises:
        ValueError: If the precision is unknown or ``clip_grad`` has other keys.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        precision: str = "auto",
        clip_grad: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(optimizer)
        if clip_grad is not None and set(clip_grad) != {"max_norm"}:
            raise ValueError(
                f"optim_wrapper.clip_grad must be dict(max_norm=...), got {dict(clip_grad)}"
            )
        self.max_norm = clip_grad["max_norm"] if clip_grad else None
        self.device_type = _compute_device_type(self._parameters()[0])
        self.precision = checked_precision(precision, self.device_type)
        self._module_norms: dict[str, Tensor] = {}

    @contextmanager
    def micro_batch(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Autocast the forward; hold back the exchange of gradients until the ``last`` backward.

        FSDP2 exchanges them every time, since gradients that wait would have to be kept whole.

        Args:
            model: The model as the engine has wrapped it.
            last: Whether the optimizer steps after this micro-batch.
        """
        exchange: AbstractContextManager[None] = nullcontext()
        if not last and isinstance(model, nn.parallel.DistributedDataParallel):
            exchange = model.no_sync()
        enabled = self.precision == "bf16"
        with (
            exchange,
            torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=enabled),
        ):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, a scalar."""
        loss.backward()

    def clip_gradients(self) -> Tensor:
        """Scale the gradients to at most ``max_norm``; return their norm before, a scalar."""
        gradients: dict[str, list[Tensor]] = {}
        for name, parameter in self._named_parameters():
            if parameter.grad is not None:
                gradients.setdefault(name.split(".")[0], []).append(parameter.grad)
        self._module_norms = {name: _global_norm(grads) for name, grads in gradients.items()}
        norm = torch.linalg.vector_norm(torch.stack(list(self._module_norms.values())))
        if self.max_norm is not None:
            used = [p for p in self._parameters() if p.grad is not None]
            nn.utils.clip_grads_with_norm_(used, self.max_norm, norm)
        return norm

    def module_norms(self) -> dict[str, float]:
        """Return the gradient norm of each part of the model (``vision``, ``projector``, ``llm``).

        They are those that the last :meth:`clip_gradients` found, before it clipped.
        """
        return {name: float(norm) for name, norm in self._module_norms.items()}

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate now of each named group."""
        return {
            group["name"].removesuffix(NO_DECAY): group["lr"]
            for group in self.optimizer.param_groups
        }

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for group in self.optimizer.param_groups:
            yield from zip(group["param_names"], group["params"], strict=True)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def checked_precision(precision: str, device_type: str) -> str:
    """Return the precision that a config means on a device, "bf16" or "fp32".

    Raises:
        ValueError: If it is unknown.
    """
    if precision not in PRECISIONS:
        hint = nearest(precision, PRECISIONS)
        raise ValueError(f"optim_wrapper.precision '{precision}' is unknown; {hint}")
    if precision == "auto":
        return "bf16" if has_native_bf16(device_type) else "fp32"
    return precision


def has_native_bf16(device_type: str) -> bool:
    """Tell whether bf16 is faster than fp32 on the device.

    On CPUs without AVX512-BF16 or AMX it is emulated: bf16 matrix products then take about eight
    times as long as fp32's.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return False


def _compute_device_type(parameter: Tensor) -> str:
    """Return the type of device that computes with a parameter.

    Shards that are offloaded lie on the CPU; they are gathered on the devices of their mesh.
    """
    if isinstance(parameter, DTensor):
        return parameter.device_mesh.device_type
    return parameter.device.type


def _global_norm(gradients: list[Tensor]) -> Tensor:
    """Return the norm over all elements, those that other processes hold included."""
    narrow = [g for g in gradients if g.dtype in _NARROW and not isinstance(g, DTensor)]
    # A norm has its tensor's type: in bfloat16 it would be wrong by up to 0.4 %.
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in narrow]
    if len(narrow) < len(gradients):
        kept = {id(g) for g in narrow}
        norm = nn.utils.get_total_norm([g for g in gradients if id(g) not in kept])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
