"""The easy-VQA data set: 5,000 images of one coloured shape, 48,248 questions, 13 answers.

Source: Victor Zhou, easy-VQA, 2019, MIT licence (``pip install easy-vqa``). A folder holds
``train`` and ``test``, each with ``questions.json``, a list of ``[question, answer, image_id]``,
and ``images/{image_id}.png``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from covft.datasets.instruct import InstructDataset
from covft.datasets.spec import InputSpec
from covft.registry import DATASETS
from covft.weights import dataset_root

SHAPES = frozenset({"circle", "rectangle", "triangle"})
COLORS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
CAPTION_QUESTION = "<image>\nDescribe the image."


def conversations(
    root: str,
    split: str = "train",
    *,
    balanced: bool = False,
    max_turns: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return the questions as records for :class:`InstructDataset`, those of an image together.

    Args:
        root: The data set's folder, to which images are relative.
        split: ``train`` or ``test``.
        balanced: Use at most as many yes/no questions of an image as other ones; they are three
            quarters of the set, and can often be guessed.
        max_turns: Questions of a conversation at most; images with more give several.
        seed: Of the questions' order.

    Raises:
        ValueError: If the folder, the split or ``max_turns`` is wrong.
    """
    if max_turns is not None and max_turns < 1:
        raise ValueError(f"max_turns must be positive or None, got {max_turns}")
    records = []
    for image_id, questions in _questions_by_image(root, split).items():
        order = np.random.default_rng([seed, image_id]).permutation(len(questions)).tolist()
        if balanced:
            order = _balanced(order, [answer for _, answer in questions])
        size = max_turns or len(order)
        for number, start in enumerate(range(0, len(order), size)):
            turns = []
            for position, index in enumerate(order[start : start + size]):
                question, answer = questions[index]
                tag = "" if position else "<image>\n"
                turns.append({"from": "human", "value": tag + question})
                turns.append({"from": "gpt", "value": answer})
            records.append(_record(split, image_id, number, turns))
    return records


def _balanced(order: list[int], answers: list[str]) -> list[int]:
    """Keep all questions without a yes/no answer, and the first yes/no ones, up to their number."""
    closed = [index for index in order if answers[index] in ("yes", "no")]
    dropped = set(closed[max(len(order) - len(closed), 1) :])
    return [index for index in order if index not in dropped]


def captions(root: str, split: str = "train") -> list[dict[str, Any]]:
    """Return a caption such as "blue rectangle" for each image whose questions settle it.

    Questions for the shape or the colour settle what they ask for, and what they name: "what is the
    blue shape?". Images without such a pair are left out: 819 of the 4,000 for training.

    Args:
        root: The data set's folder, to which images are relative.
        split: ``train`` or ``test``.

    Raises:
        ValueError: If the folder or the split is wrong.
    """
    records = []
    for image_id, questions in _questions_by_image(root, split).items():
        words: set[str] = set()
        for question, answer in questions:
            if answer in SHAPES | COLORS:
                words |= {answer, *re.findall("[a-z]+", question)}
        colors, shapes = words & COLORS, words & SHAPES
        if len(colors) == len(shapes) == 1:
            caption = f"{colors.pop()} {shapes.pop()}"
            turns = [
                {"from": "human", "value": CAPTION_QUESTION},
                {"from": "gpt", "value": caption},
            ]
            records.append(_record(split, image_id, 0, turns))
    return records


@DATASETS.register_module()
class EasyVQADataset(InstructDataset):
    """Easy-VQA as conversations or captions.

    Args:
        root: The data set's folder; by default it is fetched from the package index once.
        spec: The model's side.
        split: ``train`` or ``test``.
        kind: ``conversations``, or ``captions`` for training the projector.
        balanced: As for :func:`conversations`; only for them.
        max_turns: Questions of a conversation at most; only for conversations.
        seed: Of the questions' order; only for conversations.
        resize: As for :class:`InstructDataset`.
        max_tiles: As for :class:`InstructDataset`.
        max_length: As for :class:`InstructDataset`.
        on_bad: As for :class:`InstructDataset`.
        fraction: As for :class:`InstructDataset`.
        fraction_seed: As for :class:`InstructDataset`.

    Raises:
        ValueError: If the folder or an argument is wrong.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        spec: InputSpec,
        split: str = "train",
        kind: Literal["conversations", "captions"] = "conversations",
        balanced: bool | None = None,
        max_turns: int | None = None,
        seed: int | None = None,
        resize: str | None = None,
        max_tiles: int | None = None,
        max_length: int = 2048,
        on_bad: Literal["skip", "raise"] = "skip",
        fraction: float = 1.0,
        fraction_seed: int | None = None,
    ) -> None:
        root = str(dataset_root("easy-vqa")) if root is None else root
        if kind == "conversations":
            found = conversations(
                root, split, balanced=bool(balanced), max_turns=max_turns, seed=seed or 0
            )
        elif kind != "captions":
            raise ValueError(f"kind must be 'conversations' or 'captions', got {kind!r}")
        elif (balanced, max_turns, seed) != (None, None, None):
            raise ValueError(
                "balanced, max_turns and seed have no effect on kind='captions'; remove them"
            )
        else:
            found = captions(root, split)
        super().__init__(
            found,
            spec=spec,
            image_root=root,
            resize=resize,
            max_tiles=max_tiles,
            max_length=max_length,
            on_bad=on_bad,
            fraction=fraction,
            fraction_seed=fraction_seed,
        )


def _questions_by_image(root: str, split: str) -> dict[int, list[tuple[str, str]]]:
    path = Path(root) / split / "questions.json"
    if not path.is_file():
        raise ValueError(f"easy-VQA: {path} not found; root must hold train/ and test/")
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image_id in json.loads(path.read_text(encoding="utf-8")):
        questions.setdefault(image_id, []).append((question, answer))
    return questions


def _record(split: str, image_id: int, number: int, turns: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "id": f"easy-vqa/{split}/{image_id}/{number}",
        "image": f"{split}/images/{image_id}.png",
        "conversations": turns,
    }
