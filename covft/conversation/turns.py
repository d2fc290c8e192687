"""The turns of a conversation: their checks, their images, and the text that is context.

A turn is a mapping ``{"from": "human" | "gpt", "value": text}``, the format of LLaVA's data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from covft.conversation.templates import IMAGE_TOKEN, Template

Turn = Mapping[str, str]


def context_text(turns: Sequence[Turn]) -> str:
    """Return what a text encoder reads as context: the human turns without images and answers.

    Args:
        turns: One conversation; a question that hasn't been answered yet counts too.
    """
    questions = (turn["value"] for turn in turns if turn["from"] == "human")
    stripped = (question.replace(IMAGE_TOKEN, "").strip() for question in questions)
    return " ".join(question for question in stripped if question)


def checked_turns(turns: Sequence[Turn], *, answered: bool, sample_id: str = "") -> list[Turn]:
    """Return the turns after checking that questions and answers alternate.

    A conversation that was cut out of a longer one may start by an answer; as in LLaVA it's left
    out, there being no question to it.

    Args:
        turns: The conversation.
        answered: Whether the last turn must be an answer (training) or a question (generation).
        sample_id: Named in errors.

    Raises:
        ValueError: If the turns are malformed, empty, out of order, or an answer holds an image.
    """
    where = f"sample '{sample_id}': " if sample_id else ""
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise ValueError(f"{where}turn {number} has no text under 'value': {turn!r}")
        if turn.get("from") not in ("human", "gpt"):
            raise ValueError(
                f"{where}turn {number} is from {turn.get('from')!r}, expected 'human' or 'gpt'"
            )
    kept = list(turns[1:] if turns and turns[0]["from"] == "gpt" else turns)
    if not kept:
        raise ValueError(f"{where}the conversation has no question")
    for number, turn in enumerate(kept):
        expected = "gpt" if number % 2 else "human"
        if turn["from"] != expected:
            raise ValueError(f"{where}two turns in a row are from '{turn['from']}'")
        if expected == "gpt" and IMAGE_TOKEN in turn["value"]:
            raise ValueError(f"{where}an answer holds {IMAGE_TOKEN}; only questions may")
    last = kept[-1]["from"]
    if last != ("gpt" if answered else "human"):
        missing = "an answer" if answered else "a question"
        raise ValueError(f"{where}the last turn is from '{last}', expected {missing}")
    return kept


def placed_images(
    turns: Sequence[Turn], num_images: int, *, template: Template, sample_id: str = ""
) -> list[Turn]:
    """Return the turns with one ``<image>`` per image, where the template wants them.

    Images without a tag are put in front of the first question (LLaVA's convention); with
    ``template.image_first`` a lone image moves to the front of its own question.

    Raises:
        ValueError: If there are more tags than images, or more turns than the template can hold.
    """
    if not template.keep_questions and len(turns) > 2:
        where = f"sample '{sample_id}'" if sample_id else "the conversation"
        raise ValueError(
            f"{where} has {len(turns)} turns, but template '{template.name}' is for a single "
            "caption; choose another template"
        )
    num_tags = sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
    if num_tags > num_images:
        where = f"sample '{sample_id}'" if sample_id else "the conversation"
        raise ValueError(
            f"{where} has {num_tags} {IMAGE_TOKEN} tags but {num_images} images; "
            "remove tags or add images in the annotation"
        )
    placed: list[Turn] = []
    for turn in turns:
        text = turn["value"]
        if num_images == 1 and template.image_first and IMAGE_TOKEN in text:
            rest = text.replace(IMAGE_TOKEN, "").strip()
            text = (IMAGE_TOKEN + template.image_separator + rest).strip()
        placed.append({"from": turn["from"], "value": text})
    missing = (IMAGE_TOKEN + template.image_separator) * (num_images - num_tags)
    if missing:
        placed[0] = {"from": "human", "value": (missing + placed[0]["value"]).rstrip()}
    return placed
