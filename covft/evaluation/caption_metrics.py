"""BLEU, ROUGE-L and CIDEr of captions, as in COCO's evaluation (pycocoevalcap).

Captions are split into words by the tokenizer of the Penn Treebank (Stanford CoreNLP 3.4.1, which
pycocoevalcap brings along) where there is Java, and by a regular expression where there isn't.
Scores differ a little between the two: results say which one it was.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

_Tokenize = Callable[[Sequence[str]], list[str]]
PTB, REGEX = "PTB (Stanford CoreNLP 3.4.1)", "regular expression"

_JAR = "stanford-corenlp-3.4.1.jar"
#: Tokens that COCO's evaluation drops. It means brackets, too, but has them in capitals, when the
#: tokenizer has made all lower case: they stay.
_DROPPED = frozenset(
    {
        *("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"),
        *(".", "?", "!", ",", ":", "-", "--", "...", ";"),
    }
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
#: What that tokenizer writes for other characters.
_AS_PTB = str.maketrans({"’": "'", "‘": "`", '"': " '' ", "“": " `` ", "”": " '' "})
_AS_PTB |= str.maketrans({"–": " -- ", "—": " -- ", "…": " ... "})
_TOKEN = re.compile(
    r"""
    n't\b | '(?:s|m|d|re|ve|ll)\b    # the ends of contractions
    | (?:[^\W\d_]\.){2,}             # p.m., u.s.
    | (?:dr|ft|jr|mr|mrs|ms|st|vs)\.(?!$)
    | \d+(?:[.,:/]\d+)*              # 1,000; 3:30; 1/2
    | can(?=not\b)
    | \w+?(?=n't\b)                  # do(n't)
    | o'\w+                          # o'clock
    | \w+(?:[-/]\w+)*                # t-shirt, man/woman
    | [^\w\s]
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class CaptionScores:
    """Scores of captions, in percent but for ``cider_of_each``.

    Attributes:
        metrics: ``cider``, ``bleu_1`` to ``bleu_4`` and ``rouge_l`` of all together.
        cider_of_each: CIDEr of each caption, not in percent; above 1 where it is better than the
            references are among each other. ``cider`` is their mean.
    """

    metrics: dict[str, float]
    cider_of_each: list[float]


class CaptionScorer:
    """Scores captions of some images against references.

    CIDEr weighs words by how many of these images' references have them, so that the score of a
    part of a data set isn't comparable with that of the whole. A single image has none: 0.

    Args:
        references: Several captions for each image, at least one.

    Raises:
        ImportError: If pycocoevalcap isn't installed.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._metrics = metrics()
        texts = [text for several in references for text in several]
        self._tokenize, self.tokenizer, tokenized = _tokenizer(texts)
        words = iter(tokenized)
        self._references = {
            image: [next(words) for _ in several] for image, several in enumerate(references)
        }
        self._last: tuple[list[str], CaptionScores] = ([], CaptionScores({}, []))

    def score(self, captions: Sequence[str]) -> CaptionScores:
        """Score a caption for each image; an empty one is a caption without words."""
        if len(captions) != len(self._references):
            raise ValueError(f"{len(captions)} captions for {len(self._references)} images")
        if self._last[0] != list(captions):  # it takes half a minute for COCO
            self._last = (list(captions), self._scores(captions))
        return self._last[1]

    def _scores(self, captions: Sequence[str]) -> CaptionScores:
        said = {image: [words] for image, words in enumerate(self._tokenize(captions))}
        bleu, rouge, cider = self._metrics
        bleus, _ = bleu.compute_score(self._references, said, verbose=0)
        rouge_l, _ = rouge.compute_score(self._references, said)
        cider_all, ciders = cider.compute_score(self._references, said)
        found = {
            "cider": cider_all,
            **{f"bleu_{n}": score for n, score in enumerate(bleus, start=1)},
            "rouge_l": rouge_l,
        }
        percent = {name: 100 * float(score) for name, score in found.items()}
        return CaptionScores(percent, [float(score) for score in ciders])


def metrics() -> tuple[Any, Any, Any]:
    """Return BLEU, ROUGE-L and CIDEr of pycocoevalcap.

    Raises:
        ImportError: If it isn't installed.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ImportError(
            f"scoring captions needs pycocoevalcap: pip install -e '.[eval]' ({error})"
        ) from error
    return Bleu(4), Rouge(), Cider()


def regex_words(captions: Sequence[str]) -> list[str]:
    """Split captions into words about as the tokenizer of the Penn Treebank does.

    Returns:
        The words of each, with spaces between, in lower case, without punctuation.
    """
    texts = (caption.lower().translate(_AS_PTB).strip() for caption in captions)
    return [_kept(_BRACKETS.get(word, word) for word in _TOKEN.findall(text)) for text in texts]


def ptb_words(captions: Sequence[str], *, java: str) -> list[str]:
    """Split captions into words with the tokenizer of the Penn Treebank.

    Args:
        captions: Texts; those of several lines become one line.
        java: The program.

    Returns:
        Like :func:`regex_words`.

    Raises:
        OSError: If Java can't be started.
        ValueError: If it fails; holds what it printed.
    """
    command = [java, "-cp", str(_jar()), "edu.stanford.nlp.process.PTBTokenizer"]
    # The encoding would be the locale's, which is none at all on many servers.
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    # Java sees line ends where Python's split() sees space, a few more than "\n".
    lines = "".join(" ".join(caption.split()) + "\n" for caption in captions)
    done = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    words = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode or len(words) != len(captions):
        said = done.stderr.decode(errors="replace").strip()[-500:]
        raise ValueError(
            f"{' '.join(command)} exited with {done.returncode} and gave {len(words)} lines for "
            f"{len(captions)}: {said}"
        )
    return [_kept(line.split(" ")) for line in words]


def _kept(words: Any) -> str:
    return " ".join(word for word in words if word and word not in _DROPPED)


def _tokenizer(texts: Sequence[str]) -> tuple[_Tokenize, str, list[str]]:
    """Return how captions are tokenized here, what that is called, and the texts, tokenized."""
    java, problem = shutil.which("java"), "there is no Java"
    if java is not None:
        tokenize = partial(ptb_words, java=java)
        try:
            return tokenize, PTB, tokenize(texts)
        except (OSError, ValueError) as error:  # macOS has a "java" that only says where to get it
            problem = str(error)
    print_log(
        f"captions are split into words by a {REGEX}, not by {PTB}, which papers use ({problem}): "
        "scores differ a little",
        logger="current",
        level=logging.WARNING,
    )
    return regex_words, REGEX, regex_words(texts)


def _jar() -> Path:
    spec = find_spec("pycocoevalcap.tokenizer.ptbtokenizer")
    if spec is None or spec.origin is None:
        raise ValueError("pycocoevalcap has no tokenizer")
    return Path(spec.origin).with_name(_JAR)
