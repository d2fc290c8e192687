"""Multiple choice: how options stand in a prompt, and which one an answer means.

Every benchmark reads answers its own way, and its numbers follow from that way, quirks included:
don't mend one here. Sources stand beside the functions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."

#: Phrases that an answer follows, in the order in which they are looked for.
_ANNOUNCEMENTS = ("answer is", "answer:")
#: What may stand around a lone letter, Chinese punctuation included.
_AROUND_LETTERS = " \t\n.,:;!()[]*\"'。，：；！（）、"
_LISTED = r"[(（\[]?[A-Z][)）\]]?"
_LIST = re.compile(
    rf"{_LISTED}(?:(?:\s*[,，、/&和或]|\s+and\s|\s+or\s)+\s*{_LISTED}(?![A-Za-z0-9]))+"
)


def with_options(question: str, options: Sequence[str]) -> str:
    """Return a question with its options below, a line each: ``A. ...``, ``B. ...``."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines])


def final_answer(text: str) -> str:
    """Return what an answer comes down to, lower case: the rule of Cambrian-1's evaluation.

    That is what follows the last "answer is" or "answer:", without punctuation at the end and the
    parentheses around a letter. "The answer is: c" gives ": c", as it does there.
    """
    text = text.lower().strip()
    for announcement in _ANNOUNCEMENTS:
        text = text.split(announcement)[-1]
    return text.strip().rstrip(".:,").lstrip("(").rstrip(")")


def final_letter(text: str) -> str:
    """Return the first character of :func:`final_answer`; empty if nothing is left.

    Whatever it begins with is taken for a letter: "carnivore" is option C.
    """
    return final_answer(text)[:1]


def science_qa_letter(text: str) -> str | None:
    """Return the letter that LLaVA's ``eval_science_qa.py`` reads from an answer, or None.

    It wants the bare letter, "B. ..." with more behind it, or "The answer is B." exactly once:
    "B." alone isn't understood.
    """
    text = text.strip()
    known = LETTERS[:5]
    if len(text) == 1 and text in known:
        return text
    if len(text) >= 3 and text[0] in known and text[1:3] == ". ":
        return text[0]
    # The full stop is any character there, too.
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def option_letter(text: str, letters: Sequence[str]) -> str | None:
    """Return the one option that an answer names by its letter, or None.

    Args:
        text: A model's answer: "B", "(b)", "B. dog", "The answer is B".
        letters: Letters of the options there are. Among other words only capitals count, and none
            if different ones are named.
    """
    if _lists_letters(text, letters):
        return None
    return (
        _bare_letter(text, letters) or _leading_letter(text, letters) or _only_letter(text, letters)
    )


def option_choice(text: str, options: Mapping[str, str]) -> str | None:
    """Return the one option that an answer names, by letter or else by text, or None.

    A lone letter comes first, then an answer that is an option's text, such as "D.C." or "A, B and
    C"; then a letter in front, a single option's text as whole words, without case, and a single
    letter among other words. An answer with a list of letters names none.

    Args:
        text: A model's answer.
        options: The options' texts by letter.
    """
    letters = list(options)
    if letter := _bare_letter(text, letters):
        return letter
    said = _plain(text)
    same = [letter for letter, option in options.items() if _plain(option) == said]
    if len(same) == 1:
        return same[0]
    if _lists_letters(text, letters):
        return None
    if letter := _leading_letter(text, letters):
        return letter
    held = [letter for letter, option in options.items() if _holds(said, _plain(option))]
    return held[0] if len(held) == 1 else _only_letter(text, letters)


def _bare_letter(text: str, letters: Sequence[str]) -> str | None:
    bare = text.strip(_AROUND_LETTERS).upper()
    return bare if len(bare) == 1 and bare in letters else None


def _lists_letters(text: str, letters: Sequence[str]) -> bool:
    """Tell whether an answer begins with different letters in a row, such as "A, B and C"."""
    found = _LIST.match(text.strip())
    named = set(re.findall(r"[A-Z]", found[0])) if found else set()
    return len(named & set(letters)) > 1


def _leading_letter(text: str, letters: Sequence[str]) -> str | None:
    found = re.match(r"[(（\[]?([A-Z])[).:,、。：，）\]]", text.strip())
    return found[1] if found and found[1] in letters else None


def _only_letter(text: str, letters: Sequence[str]) -> str | None:
    named = set(re.findall(r"(?<![A-Za-z0-9])([A-Z])(?![A-Za-z0-9])", text)) & set(letters)
    if len(named) != 1 or (named == {"A"} and re.match(r"\s*A\s+\w", text)):
        return None  # "A dog" begins with an article
    return named.pop()


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".。")


def _holds(text: str, option: str) -> bool:
    # Chinese has no spaces between words, so that \b wouldn't do.
    return re.search(rf"(?<![a-z0-9]){re.escape(option)}(?![a-z0-9])", text) is not None
