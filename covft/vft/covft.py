"""CoVFT: context-aware visual fine-tuning (CVPR 2026), sections 3.2 to 3.4, and its ablations.

In a range of blocks, the FFN becomes a contextual mixture of experts
(:class:`~covft.vft.comoe.CoMoE`), routed per image by a context vector that contextual vector
extraction (:class:`~covft.vft.cve.CVE`) draws from the image's tokens and the instruction. Trained
are the CoMoE layers and the LayerNorms; all else stays frozen.

The options are the rows of Table 2 (context vector, routing), Table 4 (layer range) and Table 5
(number of experts). Choices: the image-only context is the mean over all of the layer's input
tokens, CLS and registers included, as CVE sees them; the load-balancing loss, which the paper
doesn't mention, is off by default, and is a mean over the CoMoE layers.
"""

from __future__ import annotations

from torch import nn

from covft.models.vision.backbone import VisionBackbone
from covft.models.vision.tower import VisionTower
from covft.models.vision.vit import activation as build_activation
from covft.registry import VFT
from covft.vft.base import VFTMethod
from covft.vft.comoe import CONTEXTS, TEXT_CONTEXTS, CoMoE
from covft.vft.cve import CVE
from covft.vft.router import Routing


@VFT.register_module()
class CoVFT(VFTMethod):
    """Contextual mixture-of-experts in the later blocks, dense routing.

    Args:
        num_experts: Experts E of a layer; at least 2 where the routing is learned.
        first_block: First block (0-based) with CoMoE; half of the consumed blocks by default.
        last_block: Last block with CoMoE; the last consumed one by default.
        context: What the router reads: "cve", "text-only" (the pooled text), "image-only" (the mean
            of the layer's input tokens), "concat" (both, image first) or "none" (learned logits,
            the same for every image). "auto" is "cve" where the routing is learned; the others
            have no router.
        routing: "dense" (softmax), "sparse@k" (softmax over the k largest logits), "uniform" (1/E,
            no router) or "random@k" (k random experts in training, uniform in evaluation).
        balance_loss: Weight of the load-balancing loss of sparse routing, a mean over the layers.
        shared_cve: One CVE for all layers, at least two, instead of one each.
        norms: "blocks" trains both norms of every consumed block (the public code), "all" every
            LayerNorm, the pre-norm included (the paper's wording).
        activation: Of CVE's residual blocks: "quick_gelu" (the public code, default) or "gelu"
            (eq. 7).
        recompute: Compute the hidden activations of experts and CVE's residual blocks again in the
            backward pass: less memory, more time.

    Raises:
        ValueError: If an option is unknown or would have no effect, or a block isn't consumed.
    """

    def __init__(
        self,
        *,
        num_experts: int = 4,
        first_block: int | None = None,
        last_block: int | None = None,
        context: str = "auto",
        routing: str = "dense",
        balance_loss: float = 0.0,
        shared_cve: bool = False,
        norms: str = "blocks",
        activation: str | None = None,
        recompute: bool = False,
    ) -> None:
        if num_experts < 1:
            raise ValueError(f"vft.num_experts must be at least 1, got {num_experts}")
        if norms not in ("blocks", "all"):
            raise ValueError(f"vft.norms must be 'blocks' or 'all', got {norms!r}")
        self.num_experts, self.norms, self.recompute = num_experts, norms, recompute
        self.first_block, self.last_block = first_block, last_block
        self.routing = Routing.parse(routing, num_experts)
        self.context = _checked_context(context, routing, learned=self.routing.learned)
        self.balance_loss = _checked_balance_loss(balance_loss, self.routing, num_experts)
        if self.context != "cve":
            for name, value in (("shared_cve", shared_cve), ("activation", activation)):
                if value:
                    raise ValueError(
                        f"vft.{name}={value!r} is an option of CVE, which isn't built with "
                        f"routing {routing!r} and context {self.context!r}; remove it"
                    )
        self.shared_cve, self.activation = shared_cve, _checked_activation(activation)
        self.needs_context = self.context in TEXT_CONTEXTS

    def apply(self, tower: VisionTower) -> None:
        """Replace the FFNs in the layer range; train them and the LayerNorms."""
        backbone = tower.backbone
        layers = self.layers(len(backbone.blocks))
        if self.needs_context and tower.context_dim is None:
            raise ValueError("CoVFT needs a text encoder; add model.text_encoder to the config")
        if self.shared_cve and len(layers) == 1:
            raise ValueError(
                f"vft.shared_cve=True has no effect: block {layers.start} is the only one with "
                "CoMoE; remove it, or widen first_block and last_block"
            )
        backbone.requires_grad_(False)
        shared: CVE | None = None
        for index in layers:
            block = backbone.blocks[index]
            block.mlp = CoMoE(
                block.mlp,
                context_dim=tower.context_dim if self.needs_context else None,
                num_experts=self.num_experts,
                activation=self.activation,
                context=self.context,
                routing=self.routing,
                balance_loss=self.balance_loss / len(layers),
                cve=shared,
                recompute=self.recompute,
            )
            shared = block.mlp.cve if self.shared_cve else None
        for block in backbone.blocks:
            block.norm1.requires_grad_(True)
            block.norm2.requires_grad_(True)
        if self.norms == "all":
            for module in backbone.modules():
                if isinstance(module, nn.LayerNorm):
                    module.requires_grad_(True)

    def context_free_blocks(self, backbone: VisionBackbone) -> int:
        """Return the index of the first block that reads text, or the number of all blocks."""
        blocks = len(backbone.blocks)
        return self.layers(blocks).start if self.needs_context else blocks

    def reads_context(self, backbone: VisionBackbone) -> bool:
        """Return whether a router reads text now: not those replaced by fixed gates."""
        layers = (block.mlp for block in backbone.blocks if isinstance(block.mlp, CoMoE))
        return any(layer.reads_text for layer in layers)

    def layers(self, num_blocks: int) -> range:
        """Return the blocks with CoMoE, of an encoder of which ``num_blocks`` are consumed.

        Raises:
            ValueError: If there are no such blocks.
        """
        first = num_blocks // 2 if self.first_block is None else self.first_block
        last = num_blocks - 1 if self.last_block is None else self.last_block
        for name, index in (("first_block", first), ("last_block", last)):
            if not 0 <= index < num_blocks:
                raise ValueError(
                    f"vft.{name} is {index}, but the encoder consumes {num_blocks} blocks (0 to "
                    f"{num_blocks - 1})"
                )
        if first > last:
            raise ValueError(
                f"vft.first_block ({first}) comes after vft.last_block ({last}); first_block is "
                "half of the consumed blocks where it isn't given"
            )
        return range(first, last + 1)


def _checked_context(context: str, routing: str, *, learned: bool) -> str:
    if context == "auto":
        return "cve" if learned else "none"
    if context not in CONTEXTS:
        # `--cfg-options ...context=None` gives Python's None.
        hint = "; for a router without input, use 'none'" if context is None else ""
        known = ", ".join(("auto", *CONTEXTS))
        raise ValueError(f"vft.context must be one of {known}, got {context!r}{hint}")
    if not learned:
        raise ValueError(
            f"vft.context={context!r} would be ignored: routing {routing!r} has no router to "
            "read it; remove vft.context"
        )
    return context


def _checked_activation(name: str | None) -> str:
    if name is None:
        return "quick_gelu"
    try:
        build_activation(name)
    except ValueError as error:
        raise ValueError(f"vft.{error}") from None
    return name


def _checked_balance_loss(weight: float, routing: Routing, num_experts: int) -> float:
    if weight < 0:
        raise ValueError(f"vft.balance_loss must not be negative, got {weight}")
    if weight and routing.kind != "sparse":
        raise ValueError(
            f"vft.balance_loss balances which experts sparse routing chooses; with "
            f"{routing.kind!r} routing it has no effect: remove it, or use 'sparse@k'"
        )
    if weight and routing.top_k == num_experts:
        raise ValueError(
            f"vft.balance_loss={weight} has no effect: 'sparse@{num_experts}' always chooses all "
            f"{num_experts} experts, so that the loss is constant; remove it, or choose fewer"
        )
    return weight
