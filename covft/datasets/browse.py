"""Draws a sample as the model gets it: its pixels, its text, and what of the text is supervised."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from covft.conversation import IGNORE_INDEX, decoded_spans
from covft.datasets.base import ConversationDataset
from covft.datasets.sample import BadSample, Sample

_MARGIN = 12
_LINE = 24
_TEXT_SIZE = 17
_TEXT_WIDTH = 760
_MIN_SIDE = 224
# Backgrounds and ink, in BGR.
_PAPER = (255, 255, 255)
_INK = (40, 40, 40)
SUPERVISED = (150, 235, 170)
IMAGE_TAG = (245, 220, 190)
ERROR = (200, 200, 255)


@dataclass(frozen=True)
class _Word:
    """A piece of text that isn't broken across lines, on a background colour."""

    text: str
    background: tuple[int, int, int]


def draw_sample(dataset: ConversationDataset, index: int) -> np.ndarray:
    """Draw a sample's images, and beside them its text with supervised parts highlighted.

    Args:
        dataset: Where the sample comes from.
        index: Which sample.

    Returns:
        A BGR picture, (H, W, 3) uint8. A sample that can't be used is drawn as its reason.
    """
    sample = dataset[index]
    if isinstance(sample, BadSample):
        return _text_panel([_header(sample.id), _words(sample.reason, ERROR)])
    lines = _words(_header_text(sample), _PAPER)
    text = _text_panel([lines, _sample_words(dataset, sample)])
    return _side_by_side(_image_panel(sample), text)


def _header(sample_id: str) -> list[_Word]:
    return _words(f"[{sample_id}]", _PAPER)


def _header_text(sample: Sample) -> str:
    supervised = int((sample.labels != IGNORE_INDEX).sum())
    cut = f", {sample.num_truncated} cut off" if sample.num_truncated else ""
    return f"[{sample.id}] {len(sample.input_ids)} tokens, {supervised} supervised{cut}"


def _sample_words(dataset: ConversationDataset, sample: Sample) -> list[_Word]:
    words: list[_Word] = []
    spans = decoded_spans(sample.input_ids, sample.labels, tokenizer=dataset.spec.tokenizer)
    for span in spans:
        if span.num_image_tokens:
            words.append(_Word(f"[{span.num_image_tokens} image tokens]", IMAGE_TAG))
        else:
            words += _words(span.text, SUPERVISED if span.supervised else _PAPER)
    return words


def _words(text: str, background: tuple[int, int, int]) -> list[_Word]:
    words = []
    # The sign after a break shows it; the break itself is what the layout acts upon.
    for line_number, line in enumerate(text.replace("\t", " ").split("\n")):
        if line_number:
            words.append(_Word("↵\n", background))
        words += [_Word(piece, background) for piece in _unbroken(line)]
    return words


def _unbroken(line: str) -> list[str]:
    """Split after spaces, and within what is too long or written without spaces."""
    pieces, piece = [], ""
    for character in line:
        piece += character
        if character == " " or ord(character) > 0x2E80 or len(piece) == 40:
            pieces.append(piece)
            piece = ""
    return [*pieces, piece] if piece else pieces


def _text_panel(paragraphs: list[list[_Word]]) -> np.ndarray:
    font = cv2.FontFace("uni")
    placed: list[tuple[_Word, int, int, int]] = []
    y = _MARGIN
    for words in paragraphs:
        x = _MARGIN
        for word in words:
            width = _text_width(word.text.rstrip("\n"), font)
            if x + width > _TEXT_WIDTH - _MARGIN and x > _MARGIN:
                x, y = _MARGIN, y + _LINE
            placed.append((word, x, y, width))
            x += width
            if word.text.endswith("\n"):
                x, y = _MARGIN, y + _LINE
        y += _LINE + _MARGIN
    panel = np.full((y, _TEXT_WIDTH, 3), _PAPER, dtype=np.uint8)
    for word, x, top, width in placed:
        panel[top : top + _LINE, x : x + width] = word.background
    for word, x, top, _ in placed:
        origin = (x, top + _LINE - 7)
        cv2.putText(panel, word.text.rstrip("\n"), origin, _INK, font, _TEXT_SIZE)
    return panel


def _text_width(text: str, font: cv2.FontFace) -> int:
    # A trailing space has no ink, and would be measured as nothing.
    size = (4 * _TEXT_WIDTH, _LINE)
    both = cv2.getTextSize(size, text + "|", (0, 0), font, _TEXT_SIZE)
    bar = cv2.getTextSize(size, "|", (0, 0), font, _TEXT_SIZE)
    return int(both[2] - bar[2])


def _image_panel(sample: Sample) -> np.ndarray:
    pictures = []
    for pixels in sample.pixel_values:
        picture = cv2.cvtColor(pixels.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2BGR)
        scale = -(-_MIN_SIDE // picture.shape[0])
        # Whole pixels, so that small inputs are seen as they are.
        pictures.append(
            cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
        )
    if not pictures:
        return np.full((1, 1, 3), _PAPER, dtype=np.uint8)
    return np.concatenate(pictures, axis=0)


def _side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    height = max(left.shape[0], right.shape[0])
    canvas = np.full((height, left.shape[1] + right.shape[1], 3), _PAPER, dtype=np.uint8)
    canvas[: left.shape[0], : left.shape[1]] = left
    canvas[: right.shape[0], left.shape[1] :] = right
    return canvas
