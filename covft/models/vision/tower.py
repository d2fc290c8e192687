"""The vision encoder as the MLLM sees it: pixels in, tokens out, fine-tuned by one method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from covft.models.vision.feature_cache import FeatureCache
from covft.models.vision.vit import Block
from covft.registry import VFT, VISION_BACKBONES


class VisionTower(nn.Module):
    """A vision encoder, the visual fine-tuning (VFT) method applied to it, and its connector.

    Args:
        backbone: Config of an encoder, or one already built.
        vft: Config of the method, or one already built; default: ``dict(type="Freeze")``.
        select_layer: The hidden state that the encoder's output is; default: the encoder's choice.
        context_dim: Width C of the context, for methods that read it.

    Raises:
        ValueError: If ``select_layer`` is given for an encoder already built.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        backbone: Mapping[str, Any] | nn.Module,
        vft: Mapping[str, Any] | Any = None,
        select_layer: int | None = None,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            if select_layer is not None:
                backbone = {**backbone, "select_layer": select_layer}
            backbone = VISION_BACKBONES.build(backbone)
        elif select_layer is not None:
            raise ValueError(
                "select_layer has no effect on an encoder that is already built; set it there"
            )
        self.backbone: Any = backbone
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("std", None, persistent=False)
        self._reset_buffers()
        self.context_dim = context_dim
        if vft is None:
            vft = {"type": "Freeze"}
        self.vft = VFT.build(vft) if isinstance(vft, Mapping) else vft
        self.connector: nn.Module | None = self.vft.apply(self)
        self.train(self.training)

    @property
    def hidden_dim(self) -> int:
        """Width D of the tokens."""
        return self.backbone.hidden_dim

    @property
    def num_tokens(self) -> int:
        """Tokens N of an image."""
        return self.backbone.num_tokens

    @property
    def needs_context(self) -> bool:
        """Whether ``forward`` needs the instruction's text features."""
        return self.vft.needs_context

    @property
    def cached_bytes(self) -> int:
        """Bytes that an image takes in a :class:`FeatureCache`, at the parameters' precision."""
        backbone = self.backbone
        numbers = (backbone.num_prefix + backbone.num_tokens) * backbone.hidden_dim
        return numbers * next(backbone.parameters()).element_size()

    def forward(
        self, pixel_values: Tensor, context: Any = None, *, cache: FeatureCache | None = None
    ) -> Tensor:
        """Encode images.

        Args:
            pixel_values: (I, 3, S, S): uint8 RGB, or float that is already normalised.
            context: Text features of each image's instruction, I rows; None if no method needs it.
            cache: Keeps what doesn't depend on the context, for further questions about an image.

        Returns:
            Visual tokens, (I, N, D); an empty batch gives (0, N, D).

        Raises:
            ValueError: If the pixels have another shape or type, or a cache is given in training
                mode or with gradients enabled.
        """
        if cache is None:
            features = self.backbone(self._normalise(pixel_values), context)
        else:
            features = self._forward_cached(pixel_values, context, cache)
        return features if self.connector is None else self.connector(features, context)

    def train(self, mode: bool = True) -> VisionTower:
        """Set the mode, but leave what is wholly frozen in evaluation.

        DropPath of a frozen block would only add noise to its features.
        """
        super().train(mode)
        for part in (self.backbone, self.connector):
            if part is not None and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        for block in self.backbone.modules():
            # Methods that tune a block tune at least its norms; the others only add to it.
            if isinstance(block, Block) and not any(
                p.requires_grad for norm in (block.norm1, block.norm2) for p in norm.parameters()
            ):
                block.drop_path.eval()
        return self

    def export_state_dict(self) -> dict[str, Tensor]:
        """Return the tuned encoder as a plain one, under the hub's names.

        Raises:
            ValueError: If the method adds what a plain encoder can't hold.
        """
        return self.backbone.export_state_dict(self.vft.plain_state_dict(self.backbone))

    def _forward_cached(self, pixel_values: Tensor, context: Any, cache: FeatureCache) -> Tensor:
        if self.training or torch.is_grad_enabled():
            raise ValueError(
                "a feature cache is for inference, in eval mode and without gradients; call "
                "model.eval() and torch.no_grad() around it, or leave the cache out"
            )
        self._check_shape(pixel_values)
        backbone = self.backbone
        free = self.vft.context_free_blocks(backbone)

        def encode(pixels: Tensor) -> Tensor:
            # Without the context: a block that reads it after all fails here, instead of answering
            # the next question with this one's features.
            return backbone.run_blocks(backbone.embed(self._normalise(pixels)), None, stop=free)

        cache.bind(backbone)
        tokens = cache.tokens(pixel_values, encode)
        return backbone.output(backbone.run_blocks(tokens, context, start=free))

    def _check_shape(self, pixel_values: Tensor) -> None:
        size = self.backbone.image_spec.image_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"expected pixels of shape (images, 3, {size}, {size}), got "
                f"{tuple(pixel_values.shape)}; build the image transform from the encoder's "
                "image_spec"
            )

    def _normalise(self, pixel_values: Tensor) -> Tensor:
        self._check_shape(pixel_values)
        if pixel_values.is_floating_point():
            return pixel_values
        if pixel_values.dtype != torch.uint8:
            raise ValueError(
                f"expected uint8 pixels, or floats already normalised, got {pixel_values.dtype}"
            )
        return (pixel_values.float() / 255 - self.mean) / self.std

    def _reset_buffers(self) -> None:
        spec = self.backbone.image_spec
        device = next(self.backbone.parameters()).device
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            value = torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)
            setattr(self, name, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> VisionTower:
        """Move or cast the module; mean and std stay float32, and survive the meta device."""
        super()._apply(fn, recurse)
        self._reset_buffers()
        return self
