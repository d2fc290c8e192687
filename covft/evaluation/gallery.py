"""Questions, images and answers as one page: what a run gets wrong, or where two runs differ."""

from __future__ import annotations

import base64
import html
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from covft.atomic import atomic_write_text
from covft.evaluation.benchmark import Benchmark, Item

#: Longest side of a thumbnail in pixels.
_THUMBNAIL = 256
_STYLE = """
body { font-family: sans-serif; margin: 2em; max-width: 75em; color: #222; background: #fff; }
article { display: flex; gap: 1.5em; border-top: 1px solid #ccc; padding: 1em 0; }
.images { flex: 0 0 16em; } .images img { max-width: 16em; display: block; margin-bottom: .5em; }
pre { white-space: pre-wrap; font-family: inherit; margin: 0; }
dt { font-size: .8em; color: #666; margin-top: .5em; } dd { margin: 0; }
.right { color: #06681f; } .wrong { color: #a00000; }
"""


@dataclass(frozen=True)
class Answers:
    """A run's answers and what they are worth.

    Attributes:
        run: The run's name.
        predictions: The answers by item id.
        scores: Each unit's score in [0, 1].
    """

    run: str
    predictions: Mapping[str, str]
    scores: Mapping[str, float]


def is_graded(answers: Sequence[Answers]) -> bool:
    """Tell whether scores are more than right or wrong, such as CIDEr or shares of people."""
    return any(score not in (0, 1) for one in answers for score in one.scores.values())


def shown_units(answers: Sequence[Answers]) -> list[str]:
    """Return the units that one run gets wrong, or that two runs score differently.

    Where one run's scores are more than right or wrong, that is all, the lowest first.

    Args:
        answers: Of one or two runs.

    Raises:
        ValueError: If there are more, or two runs were scored on different units.
    """
    if len(answers) == 1:
        if is_graded(answers):
            return sorted(answers[0].scores, key=answers[0].scores.__getitem__)
        return [unit for unit, score in answers[0].scores.items() if score < 1]
    if len(answers) != 2:
        raise ValueError(f"a gallery shows one or two runs, got {len(answers)}")
    first, second = (one.scores for one in answers)
    if first.keys() != second.keys():
        raise ValueError("the two runs answered different questions; score both alike")
    return [unit for unit, score in first.items() if second[unit] != score]


def write_gallery(
    path: Path, benchmark: Benchmark, answers: Sequence[Answers], *, max_units: int = 100
) -> int:
    """Write a page that needs no other file; images are in it as thumbnails.

    Args:
        path: The HTML file.
        benchmark: Whose items were asked.
        answers: Of one run or of two, see :func:`shown_units`.
        max_units: Show only the first so many; the page says how many there are.

    Returns:
        How many units are shown.

    Raises:
        ValueError: As :func:`shown_units`, or if ``max_units`` isn't positive.
    """
    if max_units < 1:
        raise ValueError(f"a gallery needs max_units of at least 1, got {max_units}")
    units = shown_units(answers)
    shown = units[:max_units]
    items: dict[str, list[Item]] = defaultdict(list)
    for item in benchmark.items():
        items[item.unit].append(item)
    graded = is_graded(answers)
    total = len(answers[0].scores)
    title = f"{benchmark.title}: {' and '.join(one.run for one in answers)}"
    kind = "wrong" if len(answers) == 1 else "scored differently"
    said = f"{len(units)} of {total} are {kind}; the first {len(shown)} are shown."
    if graded and len(answers) == 1:
        said = f"The {len(shown)} lowest scores of {total}, the lowest first."
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{said}</p>"]
    for unit in shown:
        body += [_article(benchmark, item, answers, graded=graded) for item in items[unit]]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{chr(10).join(body)}</body></html>\n"
    )
    atomic_write_text(path, page)
    return len(shown)


def _article(benchmark: Benchmark, item: Item, answers: Sequence[Answers], *, graded: bool) -> str:
    images = "".join(_image(benchmark, name) for name in item.images)
    answer = item.answer if isinstance(item.answer, str) else " / ".join(dict.fromkeys(item.answer))
    entries = [("question", item.question, ""), ("answer", answer, "")]
    if item.context not in (None, item.question):
        entries.insert(1, ("context", item.context or "", ""))
    if item.problem is not None:
        entries.append(("not asked", item.problem, "wrong"))
    for one in answers:
        score = one.scores.get(item.unit, 0.0)
        prediction = one.predictions[item.id] or "(empty)"
        if graded:
            entries.append((f"{one.run}, score {score:.2f}", prediction, ""))
        else:
            entries.append((one.run, prediction, "right" if score >= 1 else "wrong"))
    listed = "".join(
        f'<dt>{html.escape(name)}</dt><dd class="{mark}"><pre>{html.escape(text)}</pre></dd>'
        for name, text, mark in entries
    )
    heading = html.escape(item.id if item.group is None else f"{item.id} (of {item.group})")
    return (
        f'<article><div class="images">{images}</div>'
        f"<div><b>{heading}</b><dl>{listed}</dl></div></article>"
    )


def _image(benchmark: Benchmark, name: str) -> str:
    try:
        image = benchmark.open_image(name)
    except ValueError as error:
        return f'<p class="wrong">{html.escape(str(error))}</p>'
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{html.escape(name, quote=True)}" src="data:image/jpeg;base64,{data}">'
