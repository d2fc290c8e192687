"""From turns to token ids and labels.

A conversation is rendered as one text, cut at its images, and each piece is tokenised whole, so
that the ids equal those that LLaVA's and InternVL's own preprocessing feeds to the same LLM. Labels
come from the tokens' character offsets: comparing lengths of separately tokenised turns is off by
one as soon as a tokenizer treats the start of a text differently. The templates put every border
between a question and its answer where pre-tokenisers and special tokens split anyway, which makes
the prompt of the last question an exact prefix of the whole. Special tokens come from the template
alone: their names in somebody's text are text (:mod:`covft.conversation.literals`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from covft.conversation.literals import literal_tokenizer, special_names
from covft.conversation.templates import IMAGE_TOKEN, Template
from covft.conversation.turns import Turn, checked_turns, placed_images

#: The label of a position that isn't supervised.
IGNORE_INDEX = -100
#: Stands for one token of an image in ``input_ids``; no tokenizer has it.
IMAGE_TOKEN_ID = -200


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation.

    Attributes:
        input_ids: (T,); every token of an image is ``IMAGE_TOKEN_ID``.
        labels: (T,); equal to ``input_ids`` where supervised, else ``IGNORE_INDEX``. Not shifted.
        num_truncated: How many tokens the maximum length has cut off.
    """

    input_ids: Tensor
    labels: Tensor
    num_truncated: int


@dataclass(frozen=True)
class Span:
    """A run of tokens of one kind, decoded: see :func:`decoded_spans`."""

    text: str
    supervised: bool
    num_image_tokens: int = 0


def encode(
    turns: Sequence[Turn],
    *,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    num_image_tokens: int | Sequence[int] = (),
    max_length: int | None = None,
    sample_id: str = "",
) -> Encoded:
    """Tokenise a conversation for training; answers and their terminators are supervised.

    Args:
        turns: The conversation; ends by an answer.
        template: See :func:`covft.conversation.get_template`.
        tokenizer: A fast tokenizer.
        num_image_tokens: Each image's number of tokens; a single number means that every
            ``<image>`` tag is an image of that many.
        max_length: Longer conversations lose their end.
        sample_id: Named in errors.

    Raises:
        ValueError: If the turns don't alternate, there are more tags than images, or the maximum
            length cuts an image or leaves nothing supervised.
    """
    checked = checked_turns(turns, answered=True, sample_id=sample_id)
    ids, labels = _tokenised(checked, template, tokenizer, num_image_tokens, sample_id)
    num_truncated = 0 if max_length is None else max(len(ids) - max_length, 0)
    if num_truncated:
        where = f"sample '{sample_id}'" if sample_id else "the conversation"
        length = f"{where} has {len(ids)} tokens, max_length is {max_length}"
        if IMAGE_TOKEN_ID in ids[max_length:]:
            raise ValueError(f"{length}: an image would be cut; raise max_length")
        ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORE_INDEX for label in labels):
            raise ValueError(f"{length}: nothing supervised would be left; raise max_length")
    return Encoded(torch.tensor(ids), torch.tensor(labels), num_truncated)


def encode_prompt(
    turns: Sequence[Turn],
    *,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    num_image_tokens: int | Sequence[int] = (),
    sample_id: str = "",
) -> Tensor:
    """Tokenise a conversation up to where the model answers its last question.

    The arguments are :func:`encode`'s, but the last turn is a question.

    Returns:
        Token ids, (T,): a prefix of what :func:`encode` gives once the answer is there.

    Raises:
        ValueError: As :func:`encode`.
    """
    checked = checked_turns(turns, answered=False, sample_id=sample_id)
    ids, _ = _tokenised(checked, template, tokenizer, num_image_tokens, sample_id)
    return torch.tensor(ids, dtype=torch.long)


def decoded_spans(
    input_ids: Tensor, labels: Tensor, *, tokenizer: PreTrainedTokenizerBase
) -> list[Span]:
    """Decode a sample into runs that are supervised, unsupervised, or image tokens.

    Args:
        input_ids: (T,), as :func:`encode` gives it.
        labels: (T,).
        tokenizer: The one that encoded it.
    """
    ids = input_ids.tolist()
    marks = [
        (i == IMAGE_TOKEN_ID, label != IGNORE_INDEX)
        for i, label in zip(ids, labels.tolist(), strict=True)
    ]
    borders = [n for n in range(len(ids)) if n == 0 or marks[n] != marks[n - 1]] + [len(ids)]
    spans: list[Span] = []
    text_start = 0
    for start, end in itertools.pairwise(borders):
        is_image, supervised = marks[start]
        if is_image:
            spans.append(Span(IMAGE_TOKEN, supervised=False, num_image_tokens=end - start))
            text_start = end
            continue
        # Decoding a run by itself would lose a space at its front: decode from the last image on.
        before = tokenizer.decode(ids[text_start:start]) if start > text_start else ""
        spans.append(Span(tokenizer.decode(ids[text_start:end])[len(before) :], supervised))
    return spans


@dataclass(frozen=True)
class _Piece:
    text: str
    supervised: bool = False
    literal: bool = False  # somebody's words, not the template's


def _rendered(
    turns: Iterable[Turn], template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[_Piece]:
    end = template.end_of_answer(tokenizer)
    pieces = [_Piece(template.system)]
    for turn in turns:
        text = turn["value"].strip() if template.strip else turn["value"]
        if turn["from"] == "human":
            if not template.keep_questions:
                text = IMAGE_TOKEN * text.count(IMAGE_TOKEN)
            markup = template.image_prefix + IMAGE_TOKEN + template.image_suffix
            first, *others = text.split(IMAGE_TOKEN)
            pieces += [_Piece(template.before_question), _Piece(first, literal=True)]
            for other in others:
                pieces += [_Piece(markup), _Piece(other, literal=True)]
            pieces.append(_Piece(template.after_question))
        else:
            pieces += [
                _Piece(template.answer_lead if text else "", supervised=True),
                _Piece(text, supervised=True, literal=True),
                _Piece(end, supervised=True),
                _Piece(template.after_answer),
            ]
    return pieces


def _tokenised(
    turns: list[Turn],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    num_image_tokens: int | Sequence[int],
    sample_id: str,
) -> tuple[list[int], list[int]]:
    if not tokenizer.is_fast:
        raise ValueError(
            f"labels need token offsets, which {type(tokenizer).__name__} doesn't give; "
            "load a fast tokenizer (transformers.AutoTokenizer)"
        )
    if isinstance(num_image_tokens, int):
        tags = sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
        num_image_tokens = [num_image_tokens] * tags
    turns = placed_images(turns, len(num_image_tokens), template=template, sample_id=sample_id)
    pieces = _rendered(turns, template, tokenizer)
    names = special_names(tokenizer, {piece.text for piece in pieces if not piece.literal})

    ids = _leading_ids(tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    for number, chunk in enumerate(_chunks(pieces)):
        if number:
            count = num_image_tokens[number - 1]
            ids += [IMAGE_TOKEN_ID] * count
            labels += [IGNORE_INDEX] * count
        chunk_ids, chunk_labels = _chunk_ids(chunk, tokenizer, names)
        ids += chunk_ids
        labels += chunk_labels
    return ids, labels


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Asking for bos_token_id isn't enough: GPT-2's kind names a BOS token that it never puts.
    start = tokenizer("")["input_ids"][:1]
    return list(start) if start == [tokenizer.bos_token_id] else []


def _chunks(pieces: Iterable[_Piece]) -> list[list[_Piece]]:
    chunks: list[list[_Piece]] = [[]]
    for piece in pieces:
        first, *others = piece.text.split(IMAGE_TOKEN)
        chunks[-1].append(replace(piece, text=first))
        chunks += [[replace(piece, text=other)] for other in others]
    return chunks


def _chunk_ids(
    chunk: list[_Piece], tokenizer: PreTrainedTokenizerBase, names: frozenset[str]
) -> tuple[list[int], list[int]]:
    if not any(piece.text for piece in chunk):
        return [], []
    if any(name in piece.text for piece in chunk if piece.literal for name in names):
        literal = literal_tokenizer(tokenizer, names)
        chunk = [
            replace(p, text=literal.literal(p.text) if p.literal else literal.markup(p.text))
            for p in chunk
        ]
        ids, offsets = literal.tokenise("".join(piece.text for piece in chunk))
    else:
        text = "".join(piece.text for piece in chunk)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    labels = [IGNORE_INDEX] * len(ids)
    token = 0
    for start, end in _supervised_spans(chunk):
        while token < len(ids) and offsets[token][0] < start:
            token += 1
        while token < len(ids) and offsets[token][1] <= end:
            labels[token] = ids[token]
            token += 1
    return ids, labels


def _supervised_spans(chunk: Iterable[_Piece]) -> list[tuple[int, int]]:
    """Return where the text is supervised; a token may reach over the pieces of one answer."""
    spans: list[tuple[int, int]] = []
    position = 0
    for piece in chunk:
        start, position = position, position + len(piece.text)
        if piece.supervised and spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], position)
        elif piece.supervised:
            spans.append((start, position))
    return spans
