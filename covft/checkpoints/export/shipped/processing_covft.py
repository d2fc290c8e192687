"""The processor of an exported model: texts and images to the model's inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature
from transformers.utils import cached_file

from covft.checkpoints.export.shipped.configuration_covft import CoVFTConfig
from covft.conversation import Template
from covft.datasets.prompts import Prompt, collate_prompts
from covft.datasets.spec import InputSpec
from covft.datasets.streaming import answer_text
from covft.datasets.tiling import Resizing, Tiles, checked_resizing
from covft.models.vision.image_spec import ImageSpec

PROCESSOR_CONFIG = "processor_config.json"
CONTEXT_FOLDER = "context_tokenizer"
_TOKENIZERS = ("tokenizer", "context_tokenizer")
#: Arguments of from_pretrained that say where files are.
_PLACES = ("cache_dir", "force_download", "local_files_only", "revision", "token")

Images = Image.Image | Sequence[Image.Image] | None


class CoVFTProcessor:
    """Makes the model's inputs of questions and images, the way the model was trained.

    Args:
        spec: What the model expects of its data.
        resize: How training made images square; None is the encoder's own way.
    """

    def __init__(self, spec: InputSpec, *, resize: Resizing = None) -> None:
        self.spec, self.resize = spec, resize
        self.tokenizer = spec.tokenizer

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **kwargs: Any) -> CoVFTProcessor:
        """Read a processor from an exported folder, or from the hub.

        Args:
            name_or_path: The folder, or its id on the hub.
            kwargs: Where files are, as for transformers' ``from_pretrained``; others are ignored.
        """
        places = {key: value for key, value in kwargs.items() if key in _PLACES}
        file = cached_file(str(name_or_path), PROCESSOR_CONFIG, **places)
        config = json.loads(Path(str(file)).read_text(encoding="utf-8"))
        spec = dict(config["spec"])
        spec["image"] = _with_tuples(ImageSpec, spec["image"])
        spec["template"] = _with_tuples(Template, spec["template"])
        # Without a config of its own, AutoTokenizer would read the model's and warn of its type.
        places["config"] = CoVFTConfig()
        spec["tokenizer"] = AutoTokenizer.from_pretrained(str(name_or_path), **places)
        if config["has_context"]:
            spec["context_tokenizer"] = AutoTokenizer.from_pretrained(
                str(name_or_path), subfolder=CONTEXT_FOLDER, **places
            )
        resize = checked_resizing(config["resize"], config["max_tiles"])
        return cls(_with_tuples(InputSpec, spec), resize=resize)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """Do nothing: the folder names this class already."""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the processor's file; tokenizers have files of their own."""
        spec = {
            item.name: getattr(self.spec, item.name)
            for item in fields(self.spec)
            if item.name not in _TOKENIZERS
        }
        spec["image"], spec["template"] = asdict(self.spec.image), asdict(self.spec.template)
        tiles = self.resize if isinstance(self.resize, Tiles) else None
        return {
            "auto_map": {"AutoProcessor": "processing_covft.CoVFTProcessor"},
            "spec": spec,
            "resize": self.resize if tiles is None else "tiles",
            "max_tiles": None if tiles is None else tiles.max_tiles,
            "has_context": self.spec.context_tokenizer is not None,
        }

    def __call__(
        self, text: str | Sequence[str], images: Images | Sequence[Images] = None
    ) -> BatchFeature:
        """Return the model's inputs for questions.

        Args:
            text: A question, or one for each sample of a batch. ``<image>`` marks an image's place;
                images without a mark come first.
            images: A question's image or images, RGB; for a batch, one or several per question.

        Raises:
            ValueError: If questions and images differ in number.
        """
        texts: list[str] = [text] if isinstance(text, str) else list(text)
        groups: list[Any] = [images] if isinstance(text, str) else _listed(images)
        groups = groups or [None] * len(texts)
        if len(groups) != len(texts):
            raise ValueError(
                f"{len(texts)} questions, but images for {len(groups)}; give one entry of images "
                "for each question, a list where a question has several, None where it has none"
            )
        return self.encode(
            [
                Prompt(f"{n}", [{"from": "human", "value": question}], _listed(group))
                for n, (question, group) in enumerate(zip(texts, groups, strict=True))
            ]
        )

    def encode(self, prompts: Sequence[Prompt]) -> BatchFeature:
        """Return the model's inputs for prompts: conversations that end by a question."""
        batch = collate_prompts(prompts, self.spec, resize=self.resize)
        return BatchFeature({k: v for k, v in batch.items() if isinstance(v, Tensor)})

    def decode(self, token_ids: Sequence[int] | Tensor) -> str:
        """Return the text of an answer's token ids, up to the one that ends it."""
        ids = [int(i) for i in token_ids]
        stops = self.spec.template.stop_token_ids(self.tokenizer)
        end = next((place for place, i in enumerate(ids) if i in stops), len(ids))
        return answer_text(ids[:end], self.tokenizer)

    def batch_decode(self, rows: Sequence[Sequence[int]] | Tensor) -> list[str]:
        """Return the texts of answers' token ids."""
        return [self.decode(row) for row in rows]


def _listed(images: Any) -> list[Any]:
    if images is None:
        return []
    return [images] if isinstance(images, Image.Image) else list(images)


def _with_tuples(kind: Any, values: Mapping[str, Any]) -> Any:
    """Build a dataclass of values that were JSON, which has lists for tuples."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
