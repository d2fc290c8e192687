"""Models and data of real shapes, made up: random weights, pixels and token ids.

Speed and memory depend on shapes alone, so that neither weights nor images have to be there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from covft.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from covft.datasets.collate import Collator
from covft.datasets.sample import Sample
from covft.datasets.sampler import Group, StepBatchSampler
from covft.engine.flops import cost_model
from covft.models.abstract import without_files
from covft.models.mllm import MLLM
from covft.registry import LLMS, MODELS, TEXT_ENCODERS, Registry

#: Of LLaVA-1.5's 665,298 conversations, 40,688 have no image.
TEXT_ONLY_SHARE = 40_688 / 665_298
#: Tokens of a conversation besides its image's, and those of them that are supervised: estimates
#: for that mix, as the spread of a log-normal distribution around the mean is.
MEAN_TEXT_TOKENS, MEAN_SUPERVISED_TOKENS, TEXT_SPREAD = 308, 136, 0.7
#: LLaVA's system prompt, which the text encoder doesn't read.
_SYSTEM_PROMPT_TOKENS = 35

TINY_VISION = {"hidden_dim": 32, "num_heads": 4, "mlp_dim": 64, "patch_size": 8, "image_size": 32}
_TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
}


@dataclass(frozen=True)
class SampleShape:
    """Lengths of a made-up sample.

    Attributes:
        text: Tokens in the LLM besides the image's.
        supervised: The last of them, that have a label.
        context: Tokens of the instruction in the text encoder.
        images: Its images.
    """

    text: int
    supervised: int
    context: int
    images: int


def draw_shapes(
    count: int, *, seed: int, max_text: int = 1472, scale: float = 1.0
) -> list[SampleShape]:
    """Draw lengths with the statistics of LLaVA-1.5's instruction data.

    Args:
        count: Number of samples.
        seed: Of the draws.
        max_text: Longest text; the rest is cut off, as ``max_length`` does it.
        scale: Factor on the lengths, to make small ones.

    """
    rng = np.random.default_rng(seed)
    # The mean of exp(N(m, s^2)) is exp(m + s^2 / 2).
    location = np.log(MEAN_TEXT_TOKENS) - TEXT_SPREAD**2 / 2
    text = np.minimum(rng.lognormal(location, TEXT_SPREAD, count), max_text) * scale
    has_image = rng.random(count) >= TEXT_ONLY_SHARE
    shapes = []
    for length, images in zip(np.maximum(text.round(), 4).astype(int), has_image, strict=True):
        supervised = max(1, round(length * MEAN_SUPERVISED_TOKENS / MEAN_TEXT_TOKENS))
        context = length - supervised - round(_SYSTEM_PROMPT_TOKENS * scale)
        shapes.append(SampleShape(int(length), supervised, max(2, int(context)), int(images)))
    return shapes


class SyntheticDataset(Dataset[Sample]):
    """Random samples of given lengths, the same for an index at every call.

    Args:
        model: The model that they are for.
        shapes: Their lengths.
    """

    def __init__(self, model: MLLM, shapes: Sequence[SampleShape]) -> None:
        self.spec = spec_of(model)
        self.shapes = shapes
        self._vocabulary = model.llm.model.config.vocab_size

    def __len__(self) -> int:
        return len(self.shapes)

    def lengths(self) -> list[int]:
        """Return every sample's tokens in the LLM."""
        return [shape.text + shape.images * self.spec.num_image_tokens for shape in self.shapes]

    def __getitem__(self, index: int) -> Sample:
        shape = self.shapes[index]
        rng = np.random.default_rng([index, len(self.shapes)])
        text = torch.from_numpy(rng.integers(1, self._vocabulary, shape.text))
        visual = torch.full((shape.images * self.spec.num_image_tokens,), IMAGE_TOKEN_ID)
        ids = torch.cat([text[:1], visual, text[1:]])
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[-shape.supervised :] = ids[-shape.supervised :]
        side = self.spec.image.image_size
        pixels = rng.integers(0, 256, (shape.images, 3, side, side), dtype=np.uint8)
        return Sample(
            str(index), ids, labels, torch.from_numpy(pixels), str(shape.context), num_truncated=0
        )


def synthetic_loader(
    model: MLLM,
    shapes: Sequence[SampleShape],
    *,
    batch_size: int,
    accumulation: int,
    group: Group,
    pack: bool,
) -> DataLoader[Any]:
    """Return made-up samples as the engine's loader would: its sampler and its collator.

    Args:
        model: The model that they are for.
        shapes: Their lengths.
        batch_size: Samples of a micro-batch; packed, on average.
        accumulation: Micro-batches of a step.
        group: How a step's samples are chosen and arranged.
        pack: Whether micro-batches are packed.
    """
    dataset = SyntheticDataset(model, shapes)
    lengths, images = np.array(dataset.lengths()), np.array([shape.images for shape in shapes])
    sampler = StepBatchSampler(
        lengths,
        has_image=images > 0,
        batch_size=batch_size,
        accumulation=accumulation,
        group=group,
        costs=cost_model(model).costs(lengths, images) if pack else None,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=Collator(dataset.spec, pack=pack),
        pin_memory=torch.cuda.is_available(),
    )


def spec_of(model: MLLM) -> Any:
    """Return what the collator reads of a model, with stand-ins for tokenizers."""
    encoder = model.text_encoder
    config = None if encoder is None else getattr(encoder, "model", model.llm.model).config
    return SimpleNamespace(
        tokenizer=SimpleNamespace(pad_token_id=0),
        image=model.vision.backbone.image_spec,
        num_image_tokens=model.num_image_tokens,
        context_tokenizer=None if config is None else _CountingTokenizer(config.vocab_size),
        max_context_length=512 if encoder is None else encoder.max_length,
    )


class _CountingTokenizer:
    """Reads a text that is a number as so many random tokens."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(
        self, texts: Sequence[str], *, max_length: int, **options: Any
    ) -> dict[str, Tensor]:
        lengths = torch.tensor([min(int(text), max_length) for text in texts])
        shape = (len(texts), int(lengths.max()))
        return {
            "input_ids": torch.randint(1, self.vocabulary, shape),
            "attention_mask": (torch.arange(shape[1]) < lengths[:, None]).long(),
        }


def random_model(model_cfg: Mapping[str, Any], *, device: torch.device) -> MLLM:
    """Build a config's model with random weights, where it is to be used.

    Args:
        model_cfg: The ``model`` of a config.
        device: Where; at full size a GPU draws in seconds what takes a CPU minutes.

    Raises:
        UnknownArchitectureError: If only files know a part's architecture.
    """
    with device:
        model: MLLM = MODELS.build(without_files(model_cfg))
    return model.train()


def shrunk(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's model made small enough for a CPU: narrow, with fewer LLM layers.

    The encoder keeps its depth, since methods name blocks.
    """
    cfg = without_files(model_cfg)
    backbone = dict(cfg["vision"]["backbone"])
    for key in ("image_size", "grid", "arch"):
        backbone.pop(key, None)
    cfg["vision"]["backbone"] = {**backbone, "arch": TINY_VISION}
    llm = {**cfg["llm"], "arch": {**_fields(cfg["llm"], LLMS), **_TINY_TEXT, "hidden_size": 64}}
    if "num_key_value_heads" in llm["arch"]:
        llm["arch"]["num_key_value_heads"] = 4
    # Phi-3's padding id lies beyond the small vocabulary.
    cfg["llm"] = {**llm, "arch": {**llm["arch"], "pad_token_id": 0}}
    encoder = cfg.get("text_encoder")
    if encoder and (fields := _fields(encoder, TEXT_ENCODERS)):
        cfg["text_encoder"] = {**encoder, "arch": {**fields, **_TINY_TEXT}}
    return cfg


def _fields(cfg: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """Return the transformers config that a part's ``arch`` stands for; {} if it has none."""
    arch = cfg.get("arch")
    if isinstance(arch, str):
        kind = cfg["type"]
        kind = registry.get(kind) if isinstance(kind, str) else kind
        return dict(kind.variants[arch].fields)
    return dict(arch or {})
