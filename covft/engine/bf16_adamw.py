"""AdamW for bfloat16 weights that loses none of their updates.

A fine-tuning step changes a weight by about lr, far less than half the distance to the next
bfloat16: rounded to nearest, 85 % of the way at lr 2e-5 is lost (``tools/benchmark.py optim``). Two
remedies, by ``master``:

* "low_half": a float32 master weight is two halves. Its upper half, rounded half up, is the
  bfloat16 weight; the difference fits an int16, which is kept beside it. The master is exact, at 2
  bytes a parameter instead of 4, and the upper half isn't stored twice.
* "stochastic": nothing is kept. The new weight is rounded up or down at random such that its mean
  is exact. The random numbers depend on the step and the parameter alone, so that replicas round
  alike and a resumed run goes on bit by bit.

Moments are in 8 bits, quantised in blocks of 256 (Dettmers et al., ICLR 2022, by bitsandbytes'
kernels), or in float32. There is no bfloat16 here: a second moment that decays by 0.1 % a step is
less than half of its last bit away from where it was, and would never decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from covft.models.llm_adapters import import_bitsandbytes
from covft.registry import nearest

MASTERS = ("low_half", "stochastic")
MOMENTS = ("8bit", "float32")
#: Parameters with fewer elements keep float32 moments.
MIN_8BIT_SIZE = 4096
#: Elements that share a scale in 8-bit moments; fixed by bitsandbytes' kernels.
BLOCK = 256
#: Elements updated at once: what is temporary is three or four times this in 4 bytes.
CHUNK = 2**24
_HALF = 1 << 15
#: Bits of the one NaN that is kept: others overflow when they are rounded, or round to infinity.
_NAN = 0x7FC00000


class BF16AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, ICLR 2019) for parameters in bfloat16.

    Parameters in float32 are updated as they are. The state of a parameter never is a copy of it:
    what is saved with the weights is what the forward pass computes with; a checkpoint has the
    lower halves in the optimizer's state.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the second moment's root.
        weight_decay: Decoupled decay.
        master: "low_half" or "stochastic", see the module.
        moments: "8bit" (needs bitsandbytes) or "float32".
        compile: Compile what comes before and after the moments' update into a kernel each; it
            takes a C++ compiler, or Triton on a GPU.

    Raises:
        ValueError: If an option is unknown or out of range.
        ImportError: If bitsandbytes is missing.
    """

    #: Whether updates smaller than the parameter's precision are kept.
    keeps_small_updates: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        master: str = "low_half",
        moments: str = "8bit",
        compile: bool = False,
    ) -> None:
        for name, value, known in (("master", master, MASTERS), ("moments", moments, MOMENTS)):
            if value not in known:
                raise ValueError(
                    f"optim_wrapper.optimizer.{name} '{value}' is unknown; {nearest(value, known)}"
                )
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                "optim_wrapper.optimizer: lr, eps and weight_decay must be at least 0 and betas in "
                f"[0, 1), got lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}"
            )
        self._bitsandbytes = (
            import_bitsandbytes("optim_wrapper.optimizer.moments='8bit'")
            if moments == "8bit"
            else None
        )
        self.master, self.moments = master, moments
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._kernels = _Kernels().compiled() if compile else _Kernels()
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options)
        for group in self.param_groups:
            for parameter in group["params"]:
                _check_parameter(parameter)

    @property
    def state_layout(self) -> dict[str, str]:
        """The options that decide what the state holds; a resumed run must have the same."""
        return {"master": self.master, "moments": self.moments}

    def state_bytes(self, numel: int, dtype: torch.dtype) -> dict[str, int]:
        """Return the bytes of state of a parameter: ``low_half`` and ``moments``.

        Args:
            numel: Its number of elements.
            dtype: Its type.
        """
        has_low = dtype == torch.bfloat16 and self.master == "low_half"
        each = numel + 4 * math.ceil(numel / BLOCK) if self._in_8_bits(numel) else 4 * numel
        return {"low_half": 2 * numel * has_low, "moments": 2 * each}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: Computes the loss, and gradients, before; as in PyTorch's optimizers.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = count()
        for group in self.param_groups:
            for parameter in group["params"]:
                number = next(index)
                if parameter.grad is not None and parameter.numel() > 0:
                    self._update(parameter, group, number)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state with each tensor's own type.

        Raises:
            ValueError: If it is that of another optimizer or of other options.
        """
        # PyTorch's would cast every tensor to its parameter's type: codes and lower halves, too.
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            saved = state_dict["state"].get(number)
            if saved is None:
                continue
            fresh = self._initial_state(parameter)
            found, expected = _kinds(saved), _kinds(fresh)
            if found != expected:
                raise ValueError(
                    "the optimizer's state is that of another optimizer or of other options "
                    f"(parameter {number} has {found}, expected {expected} for "
                    f"{self.state_layout}); resume with the same optim_wrapper.optimizer, or start "
                    "a new stage from the weights"
                )
            for name, value in fresh.items():
                if isinstance(value, Tensor):
                    value.copy_(saved[name])
                else:
                    fresh[name] = saved[name]
            self.state[parameter] = fresh

    def _initial_state(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"step": 0}
        if parameter.dtype == torch.bfloat16 and self.master == "low_half":
            state["low_half"] = torch.zeros_like(parameter, dtype=torch.int16)
        eight_bit = self._in_8_bits(parameter.numel())
        dtype = torch.uint8 if eight_bit else torch.float32
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(
                parameter, dtype=dtype, memory_format=torch.contiguous_format
            )
            if eight_bit:
                blocks = math.ceil(parameter.numel() / BLOCK)
                state[f"{name}_scale"] = torch.zeros(blocks, device=parameter.device)
        return state

    def _in_8_bits(self, numel: int) -> bool:
        return self.moments == "8bit" and numel >= MIN_8BIT_SIZE

    def _update(self, parameter: Tensor, group: Mapping[str, Any], number: int) -> None:
        if not self.state[parameter]:
            self.state[parameter] = self._initial_state(parameter)
        state = self.state[parameter]
        state["step"] += 1
        assert parameter.grad is not None
        tensors = {"weight": parameter, "grad": parameter.grad} | {
            name: value for name, value in state.items() if isinstance(value, Tensor)
        }
        flat = {name: tensor.detach().reshape(-1) for name, tensor in tensors.items()}
        for start, part in _chunks(flat):
            seed = (state["step"] * 1_000_003 + number) * 65_537 + start // CHUNK
            self._update_part(part, group, step=state["step"], seed=seed)

    def _update_part(
        self, part: Mapping[str, Tensor], group: Mapping[str, Any], *, step: int, seed: int
    ) -> None:
        """Update up to ``CHUNK`` elements, given as vectors, in place."""
        weight, grad, low = part["weight"], part["grad"].float(), part.get("low_half")
        master = weight if weight.dtype == torch.float32 else self._kernels.join(weight, low)
        if "exp_avg_scale" in part:
            self._update_8bit(master, grad, part, group, step)
        else:
            self._kernels.adamw(
                master, grad, part["exp_avg"], part["exp_avg_sq"], *_factors(group, step)
            )
        if low is not None:
            self._kernels.split(master, weight, low)
        elif weight.dtype == torch.bfloat16:
            generator = torch.Generator(weight.device).manual_seed(seed)
            noise = torch.randint(
                1 << 16,
                weight.shape,
                dtype=torch.int32,
                device=weight.device,
                generator=generator,
            )
            self._kernels.round(master, weight, noise)

    def _update_8bit(
        self,
        master: Tensor,
        grad: Tensor,
        part: Mapping[str, Tensor],
        group: Mapping[str, Any],
        step: int,
    ) -> None:
        assert self._bitsandbytes is not None
        functional = self._bitsandbytes.functional
        if master.device not in self._maps:
            signed, unsigned = (functional.create_dynamic_map(signed=s) for s in (True, False))
            self._maps[master.device] = signed.to(master.device), unsigned.to(master.device)
        signed, unsigned = self._maps[master.device]
        functional.optimizer_update_8bit_blockwise(
            "adam",
            grad,
            master,
            part["exp_avg"],
            part["exp_avg_sq"],
            *group["betas"],
            0.0,
            0.0,
            group["eps"],
            step,
            group["lr"],
            signed,
            unsigned,
            part["exp_avg_scale"],
            part["exp_avg_sq_scale"],
            weight_decay=group["weight_decay"],
        )


def _join(weight: Tensor, low: Tensor | None) -> Tensor:
    """Return the float32 of a bfloat16 weight and, if there is one, its lower half."""
    bits = weight.view(torch.int16).to(torch.int32)
    bits <<= 16
    if low is not None:
        bits += low
    return bits.view(torch.float32)


def _split(master: Tensor, weight: Tensor, low: Tensor) -> None:
    """Write a float32 into its halves."""
    bits = _bits(master)
    # Half up in the magnitude: what is left is in [-2^15, 2^15), where an int16 reaches.
    upper = bits + _HALF
    upper >>= 16
    weight.view(torch.int16).copy_(upper)
    upper <<= 16
    bits -= upper
    low.copy_(bits)


def _round(master: Tensor, weight: Tensor, noise: Tensor) -> None:
    """Write a float32 into a bfloat16, rounded by ``noise``, uniform on [0, 2^16)."""
    bits = _bits(master)
    bits += noise
    bits >>= 16
    weight.view(torch.int16).copy_(bits)


def _bits(master: Tensor) -> Tensor:
    """Return a copy of a float32's bits, in which every NaN is ``_NAN``."""
    return torch.where(master.isnan(), _NAN, master.view(torch.int32))


def _adamw(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    kept: float,
    beta1: float,
    beta2: float,
    root: float,
    eps: float,
    step_size: float,
) -> None:
    """Update weight and moments in place; see :func:`_factors` for the numbers."""
    master.mul_(kept)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # As a factor, not as addcdiv's ``value``: a schedule's new number would be compiled anew.
    master.sub_((exp_avg * step_size).div_((exp_avg_sq.sqrt().div_(root)).add_(eps)))


def _factors(group: Mapping[str, Any], step: int) -> tuple[float, ...]:
    """Return what decay keeps, betas, the second bias correction's root, eps, lr over the first."""
    beta1, beta2 = group["betas"]
    return (
        1 - group["lr"] * group["weight_decay"],
        beta1,
        beta2,
        math.sqrt(1 - beta2**step),
        group["eps"],
        group["lr"] / (1 - beta1**step),
    )


class _Kernels(NamedTuple):
    """What is done to a chunk."""

    join: Callable[..., Tensor] = _join
    adamw: Callable[..., None] = _adamw
    split: Callable[..., None] = _split
    round: Callable[..., None] = _round

    def compiled(self) -> _Kernels:
        kernels: list[Any] = [torch.compile(kernel, dynamic=True) for kernel in self]
        return _Kernels(*kernels)


def _check_parameter(parameter: Tensor) -> None:
    if parameter.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"BF16AdamW updates bfloat16 and float32 parameters, found {parameter.dtype}; change "
            "model.dtype or optim_wrapper.optimizer.type"
        )
    if not parameter.is_contiguous():
        raise ValueError(
            f"BF16AdamW needs contiguous parameters, found strides {parameter.stride()} for shape "
            f"{tuple(parameter.shape)}; call .contiguous() where the module makes it"
        )


def _chunks(flat: Mapping[str, Tensor]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield where each chunk starts, and that part of every vector; scales are one per block."""
    for start in range(0, flat["weight"].numel(), CHUNK):
        yield (
            start,
            {
                name: tensor[start // BLOCK : -(-(start + CHUNK) // BLOCK)]
                if name.endswith("_scale")
                else tensor[start : start + CHUNK]
                for name, tensor in flat.items()
            },
        )


def _kinds(state: Mapping[str, Any]) -> dict[str, str]:
    """Return for each entry, in the order of their names, its type, and a tensor's shape."""
    return {
        name: f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else type(value).__name__
        for name, value in sorted(state.items())
    }
