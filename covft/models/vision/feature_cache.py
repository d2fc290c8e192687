"""Vision tokens kept over several questions about one image.

A visual fine-tuning method says how many leading blocks of the encoder don't read the instruction
(``VFTMethod.context_free_blocks``): half of them under CoVFT, all under methods that read no text.
Their output depends on the pixels alone, so one computation serves every question.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available

#: Bytes of a cache by default: 454 images of CLIP-L/14-336 in fp32.
DEFAULT_MAX_BYTES = 2**30


class FeatureCache:
    """The tokens of the images used last, found by the images' pixels.

    :meth:`bind` empties a cache that meets other weights, another autocast type, or another state
    of a module that has one (its ``cache_state()``, such as the routing at inference). Changes that
    autograd doesn't see (``parameter.data``) escape it.

    Args:
        max_bytes: Bound on the tokens' memory, on the encoder's device.

    Attributes:
        num_bytes: Memory of the tokens held.
        num_hits: Images that were found, an image's repetitions in one batch included.
        num_misses: Images that were encoded.

    Raises:
        ValueError: If ``max_bytes`` isn't positive.
    """

    def __init__(self, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        if max_bytes < 1:
            raise ValueError(
                f"a feature cache needs max_bytes of at least 1, got {max_bytes}; leave the cache "
                "out to encode every image anew"
            )
        self.max_bytes = max_bytes
        self.num_bytes = self.num_hits = self.num_misses = 0
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()  # least recently used first
        self._weights: list[Tensor] = []
        self._state: list[Any] = []

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Drop all tokens."""
        self._rows.clear()
        self.num_bytes = 0

    def bind(self, encoder: nn.Module) -> None:
        """Drop all tokens if the encoder would compute others now.

        Args:
            encoder: Whose tokens are asked for next.
        """
        weights = [*encoder.parameters(), *encoder.buffers()]
        state: list[Any] = [
            (id(w), w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights
        ]
        state.append(_autocast_dtype(weights[0].device.type))
        modules: Iterable[Any] = encoder.modules()
        state += [module.cache_state() for module in modules if hasattr(module, "cache_state")]
        if state != self._state:
            self.clear()
            # Held, so that no later tensor gets the id of one of these.
            self._weights, self._state = weights, state

    def tokens(self, pixel_values: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the tokens of images, encoding those that aren't held, each once.

        Args:
            pixel_values: (I, 3, S, S), of any type.
            encode: Maps pixels of some of the images to their tokens, (I', T, D).

        Returns:
            (I, T, D), in the images' order.

        Raises:
            ValueError: If the tokens of one image alone exceed ``max_bytes``.
        """
        keys = _digests(pixel_values)
        rows = {key: self._rows[key] for key in keys if key in self._rows}
        new = {key: index for index, key in enumerate(keys) if key not in rows}
        self.num_misses += len(new)
        self.num_hits += len(keys) - len(new)
        if new or not keys:
            encoded = encode(pixel_values[list(new.values())])
            rows.update(zip(new, encoded, strict=True))
        for key in rows:
            self._keep(key, rows[key])
        if len(new) == len(keys):
            return encoded
        return torch.stack([rows[key] for key in keys])

    def _keep(self, key: bytes, row: Tensor) -> None:
        if key in self._rows:
            self._rows.move_to_end(key)
            return
        size = row.numel() * row.element_size()
        if size > self.max_bytes:
            raise ValueError(
                f"one image's tokens take {size} bytes, more than the feature cache's max_bytes "
                f"({self.max_bytes}); raise it, or leave the cache out"
            )
        while self.num_bytes + size > self.max_bytes:
            _, oldest = self._rows.popitem(last=False)
            self.num_bytes -= oldest.numel() * oldest.element_size()
        self._rows[key] = row.clone()  # a view would keep the whole batch's tokens alive
        self.num_bytes += size


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    if is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def _digests(pixel_values: Tensor) -> list[bytes]:
    kind = str(pixel_values.dtype).encode()  # equal bytes of another type are another image
    images = pixel_values.cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    return [hashlib.sha256(kind + image.tobytes()).digest() for image in images]
