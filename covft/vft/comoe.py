"""The contextual mixture of experts (CoVFT, section 3.4) that takes an FFN's place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from covft.models.text_encoder import Context
from covft.models.vision.vit import MLP
from covft.vft.base import check_context
from covft.vft.cve import CVE
from covft.vft.experts import WideExperts
from covft.vft.routed_experts import routed_experts
from covft.vft.router import Routing, build_router, largest

#: What a router's input is made of; see :class:`~covft.vft.covft.CoVFT`.
CONTEXTS = ("cve", "text-only", "image-only", "concat", "none")
TEXT_CONTEXTS = ("cve", "text-only", "concat")


@dataclass(frozen=True, eq=False)  # tensors don't compare to one truth: each is its own
class InferenceRouting:
    """What a layer does instead of its own routing; see :mod:`covft.vft.inference`.

    Attributes:
        top_k: Experts kept per image, their gates scaled to sum to 1; None keeps all.
        gates: Gates (I, E), or (1, E) for all images, to use without asking CVE and router; None
            asks them.
    """

    top_k: int | None = None
    gates: Tensor | None = None


class CoMoE(nn.Module):
    """Experts copied from a pretrained FFN, mixed by context-routed weights (eq. 9-10).

    Args:
        ffn: The pretrained FFN; every expert starts as its copy.
        context_dim: Width C of the text; None where it isn't read.
        num_experts: Experts E.
        activation: Of CVE's residual blocks.
        context: One of :data:`CONTEXTS`; only "none" where the routing isn't learned.
        routing: How the gates come about.
        balance_loss: Weight of this layer's load-balancing loss.
        cve: A CVE to share with other layers; by default "cve" builds the layer's own.
        recompute: Compute hidden activations of experts and CVE again in the backward pass.
    """

    def __init__(
        self,
        ffn: MLP,
        *,
        context_dim: int | None,
        num_experts: int,
        activation: str = "quick_gelu",
        context: str = "cve",
        routing: Routing | None = None,
        balance_loss: float = 0.0,
        cve: CVE | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        routing = routing or Routing("dense")
        assert context in CONTEXTS and (routing.learned or context == "none")
        assert context_dim is not None or context not in TEXT_CONTEXTS
        width, text = ffn.fc1.weight.shape[1], context_dim or 0
        widths = {"cve": text, "text-only": text, "image-only": width, "concat": width + text}
        self.context = context
        self.experts = WideExperts(ffn, num_experts, recompute=recompute)
        if context == "cve" and cve is None:
            cve = CVE(width, text, activation=activation, recompute=recompute)
        self.cve = None if cve is None else cve.to(ffn.fc1.weight)
        self.router = build_router(
            routing, num_experts, context_dim=widths.get(context, 0), balance_loss=balance_loss
        ).to(ffn.fc1.weight)
        #: Set for a while by :func:`covft.vft.inference.inference_routing`.
        self.inference: InferenceRouting | None = None

    @property
    def reads_text(self) -> bool:
        """Whether a forward would read the text now."""
        fixed = self.inference is not None and self.inference.gates is not None
        return self.context in TEXT_CONTEXTS and not fixed

    def cache_state(self) -> InferenceRouting | None:
        """Return what a cached output depends on besides weights and input, see ``VFTMethod``."""
        # Outputs of a layer that reads text aren't cached: its routing need not empty the cache.
        return None if self.context in TEXT_CONTEXTS else self.inference

    def forward(self, x: Tensor, context: Context | None) -> Tensor:
        """Mix the experts' outputs.

        Args:
            x: Normalised tokens, (I, T, D).
            context: Frozen text features of each image's instruction; ``pooled`` is (I, C). None
                where text isn't read, see :attr:`reads_text`.

        Returns:
            Like ``x``; equal to the pretrained FFN at initialisation.

        Raises:
            ValueError: If there is no context, or not one row per image.
        """
        if self.inference is not None:
            return self._forward_for_inference(x, context, self.inference)
        return self._mix(x, self._gates(x, context), sparse=self.router.sparse)

    def _mix(self, x: Tensor, gates: Tensor, *, sparse: bool) -> Tensor:
        gates = gates.to(x.dtype)
        return routed_experts(self.experts, x, gates) if sparse else self.experts(x, gates)

    def _gates(self, x: Tensor, context: Context | None) -> Tensor:
        return self.router(self._context_vector(x, context))

    def _context_vector(self, x: Tensor, context: Context | None) -> Tensor:
        """Return what the router reads, one row per image."""
        if self.context == "none":
            return x.new_empty(len(x), 0)
        if self.context == "image-only":
            return x.mean(1)
        text = check_context(context, len(x), reader="CoMoE").pooled.to(x.dtype)
        if self.cve is not None:
            return self.cve(x, text)
        return text if self.context == "text-only" else torch.cat([x.mean(1), text], dim=1)

    def _forward_for_inference(
        self, x: Tensor, context: Context | None, instead: InferenceRouting
    ) -> Tensor:
        if self.training or torch.is_grad_enabled():
            raise ValueError(
                "inference_routing(...) is active, but the model is in training mode or gradients "
                "are recorded; call model.eval() and use torch.no_grad()"
            )
        if instead.gates is None:
            gates = self._gates(x, context)
        else:
            gates = instead.gates.to(x)
            if len(gates) not in (1, len(x)):
                raise ValueError(
                    f"{len(x)} images, but inference_routing's gates for {len(gates)}; give a row "
                    "per image, or one for all"
                )
            gates = gates.expand(len(x), -1)
        top_k = instead.top_k
        if top_k is None or top_k == gates.shape[1]:
            return self._mix(x, gates, sparse=self.router.sparse)
        gates = gates * largest(gates, top_k)
        return self._mix(x, gates / gates.sum(1, keepdim=True), sparse=True)

    def public_state_dict(self) -> dict[str, Tensor]:
        """Return the weights under the names and shapes of the public checkpoints' ``mlp.*``.

        Those hold CVE and dense routing. Other variants keep the names of what they have: without
        CVE its names are missing; ``gate.weight`` is (E, the context vector's width), image before
        text; a router without input has ``gate.bias`` alone; an unlearned one has nothing.
        """
        return {
            **{f"experts.{key}": value for key, value in self.experts.per_expert().items()},
            **({} if self.cve is None else self.cve.public_state_dict()),
            **{f"gate.{key}": value.detach() for key, value in self.router.named_parameters()},
        }

    @torch.no_grad()
    def load_public_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy weights in from the public names.

        Raises:
            ValueError: If names or shapes aren't exactly those of this layer.
        """
        own = {key: tuple(value.shape) for key, value in self.public_state_dict().items()}
        given = {key: tuple(value.shape) for key, value in state.items()}
        if own != given:
            differing = sorted(
                key for key in own.keys() | given.keys() if own.get(key) != given.get(key)
            )
            lines = [f"{k}: expected {own.get(k)}, found {given.get(k)}" for k in differing[:10]]
            raise ValueError(f"{len(differing)} CoMoE weights don't fit:\n" + "\n".join(lines))
        self.experts.load_per_expert(state)
        if self.cve is not None:
            self.cve.load_public_state_dict(state)
        for name, parameter in self.router.named_parameters():
            parameter.copy_(state[f"gate.{name}"])
