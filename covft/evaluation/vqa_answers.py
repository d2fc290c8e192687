"""Short answers scored against those of ten people: VQA accuracy.

Answers are normalised as by the EvalAI server of the VQA challenge, in the version of Pythia's
``EvalAIAnswerProcessor``, which LLaVA's ``m4c_evaluator.py`` uses for TextVQA. Its quirks are part
of the published numbers: don't mend them.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from covft.atomic import atomic_write_text
from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.tables import Row, RowError

SHORT_INSTRUCTION = "Answer the question using a single word or phrase."
#: How many people answered each question.
NUM_ANSWERS = 10

_NUMBERS = dict(
    none="0",
    **{
        word: str(number)
        for number, word in enumerate(
            ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
        )
    },
)
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# "(?!<=" is a misprint of "(?<!", so that full stops behind digits go, too.
_FULL_STOP = re.compile(r"(?!<=\d)(\.)(?!\d)")
#: Upstream passes ``re.UNICODE`` as the number of replacements.
_MAX_FULL_STOPS = int(re.UNICODE)
_COMMA_IN_NUMBER = re.compile(r"(?<=\d)(\,)+(?=\d)")
#: Each is also known with any one of its apostrophes forgotten.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round upstream


@lru_cache(maxsize=1 << 16)
def normalised_answer(text: str) -> str:
    """Return an answer without articles and punctuation, numbers as digits, in lower case."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(text).split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    bare = text
    has_comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        # Next to a space it goes, between letters it becomes one.
        goes = f"{mark} " in text or f" {mark}" in text or has_comma_in_number
        bare = bare.replace(mark, "" if goes else " ")
    return _FULL_STOP.sub("", bare, count=_MAX_FULL_STOPS)


def consensus(prediction: str, answers: Sequence[str]) -> float:
    """Return the VQA accuracy of an answer, in [0, 1].

    It is right if three of the others gave it, averaged over leaving out each person in turn
    (Antol et al., "VQA", ICCV 2015; visualqa.org/evaluation). An empty one is wrong.

    Args:
        prediction: A model's answer.
        answers: Those of people.
    """
    if not prediction.strip():
        return 0.0
    said = normalised_answer(prediction)
    same = [normalised_answer(answer) == said for answer in answers]
    matching = sum(same)
    return sum(min(1.0, (matching - own) / 3) for own in same) / len(same)


def human_answers(row: Row, answers: object) -> tuple[str, ...]:
    """Return the answers of ten people as texts, whatever they are: "nan" and "" are answers.

    Args:
        row: Whose they are, for the message.
        answers: What the file holds as such.

    Raises:
        RowError: If they aren't ten texts.
    """
    if not isinstance(answers, list) or len(answers) != NUM_ANSWERS:
        found = f"{len(answers)} of them" if isinstance(answers, list) else repr(answers)
        raise RowError(f"'answers' must be a list of {NUM_ANSWERS}, found {found}")
    if not all(isinstance(answer, str) for answer in answers):
        raise RowError(f"'answers' must hold texts, found {answers}")
    return tuple(answers)


class ConsensusVQA(Benchmark):
    """Questions that ten people answered; the headline is the VQA accuracy.

    An item's score is between 0 and 1 where people disagree.
    """

    @abstractmethod
    def read_items(self) -> list[Item]:
        """Read the official files; ``Item.answer`` is what the ten people said."""

    def is_correct(self, prediction: str, item: Item) -> bool:
        """Tell whether any of the people gave the answer."""
        return consensus(prediction, item.answer) > 0

    def item_scores(self, predictions: Mapping[str, str]) -> dict[str, float]:
        """Return each question's VQA accuracy."""
        return {
            item.id: consensus(predictions[item.id], item.answer) if item.problem is None else 0.0
            for item in self.items()
        }

    def export(self, predictions: Mapping[str, str], folder: Path) -> list[Path]:
        """Write ``[{"question_id", "answer"}]``, which visualqa.org's tools and EvalAI read."""
        answers = [
            {"question_id": int(i.id) if i.id.isdecimal() else i.id, "answer": predictions[i.id]}
            for i in self.items()
        ]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        atomic_write_text(path, json.dumps(answers, ensure_ascii=False) + "\n")
        return [path]
