"""What a visual fine-tuning (VFT) method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from covft.models.text_encoder import Context
    from covft.models.vision.backbone import VisionBackbone
    from covft.models.vision.tower import VisionTower


class VFTMethod(ABC):
    """A way to fine-tune a vision encoder.

    A method edits the built and loaded encoder: it decides what trains (``requires_grad``),
    replaces submodules of blocks, or blocks, and may bring a connector between encoder and
    projector. Whatever it puts into a block gets the context as an argument: ``mlp(x, context)``,
    ``attn(x, context, rope)``, ``block(x, context, rope)``. Every trainable parameter must be part
    of each forward, even one without images: distributed training waits for its gradient.

    A module whose output depends on more than weights and inputs, such as a setting for inference,
    has a method ``cache_state()``. It returns a value that compares unequal (``==``) once kept
    features are stale; :class:`~covft.models.vision.feature_cache.FeatureCache` asks for it.
    """

    #: Whether the method's modules read the context; the text encoder is built only if so.
    needs_context: bool = False
    #: Whether the features right after ``apply`` are the frozen encoder's.
    identity_at_init: ClassVar[bool] = True
    #: Learning rate of the method's parameters where a config asks for the method's own
    #: (``optim_wrapper.lr={"vision": "method"}``); its source stands in the class's docstring.
    learning_rate: float = 2e-5

    @abstractmethod
    def apply(self, tower: VisionTower) -> nn.Module | None:
        """Edit ``tower`` in place, starting from a frozen encoder.

        Returns:
            A connector, called as ``connector(features, context)`` on (I, N, D), or None.
        """

    def context_free_blocks(self, backbone: VisionBackbone) -> int:
        """Return how many leading blocks have outputs that don't depend on the context.

        Their outputs are cached per image. A method that reads the context in later blocks alone,
        or in its connector, says so here.
        """
        return 0 if self.needs_context else len(backbone.blocks)

    def reads_context(self, backbone: VisionBackbone) -> bool:
        """Return whether a forward would read the context now; the text encoder runs only if so."""
        return self.needs_context

    def plain_state_dict(self, backbone: VisionBackbone) -> dict[str, Tensor]:
        """Return the tuned encoder as weights of the plain one, under the plain one's names.

        Methods that end in a plain ViT override this.

        Raises:
            ValueError: If the method adds what a plain encoder can't hold.
        """
        name = type(self).__name__
        raise ValueError(
            f"an encoder tuned by {name} isn't a plain ViT: it can't be exported as one. Methods "
            f"whose result is one say so by plain_state_dict, which {name} doesn't define"
        )


def check_context(context: Context | None, images: int, *, reader: str) -> Context:
    """Return the context if it has one row per image.

    Args:
        context: What a module was called with.
        images: Number I of images that it was called with.
        reader: The module, for the error message.

    Raises:
        ValueError: If there is no context, or not one row per image.
    """
    if context is None:
        raise ValueError(
            f"{reader} was called without context; pass the instruction's text features"
        )
    if len(context.pooled) != images:
        raise ValueError(
            f"{images} images, but context rows for {len(context.pooled)}: {reader} needs one row "
            "per image, see Context.rows"
        )
    return context
