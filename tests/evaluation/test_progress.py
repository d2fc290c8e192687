"""The lines and the bar that tell how far inference is."""

import sys
from types import SimpleNamespace

import pytest

from covft.evaluation import progress
from covft.evaluation.progress import InferenceProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    found = SimpleNamespace(now=100.0, lines=[])
    monkeypatch.setattr(progress.time, "monotonic", lambda: found.now)
    monkeypatch.setattr(progress, "print_log", lambda text, logger: found.lines.append(text))
    return found


def test_lines_come_now_and_then_with_the_time_left(clock) -> None:
    with InferenceProgress("gqa", total=100, done=20) as bar:
        for _ in range(4):
            clock.now += 20
            bar.advance(20)
    assert clock.lines == [
        "gqa: 60 of 100 questions answered, 1.00 per s, ETA 0:00:40",
        "gqa: 100 of 100 questions answered, 1.00 per s, in 0:01:20",
    ]


def test_nothing_is_shown_where_nothing_happens_or_by_other_processes(clock) -> None:
    with InferenceProgress("gqa", total=20, done=20):
        pass
    with InferenceProgress("gqa", total=20, shown=False) as bar:
        clock.now += 99
        bar.advance(20)
    assert clock.lines == []


def test_a_terminal_shows_a_bar(
    clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with InferenceProgress("gqa", total=8) as bar:
        clock.now += 40
        bar.advance(3)
        assert clock.lines == []
        bar.advance(5)
    assert "gqa" in capsys.readouterr().err
    assert clock.lines == ["gqa: 8 of 8 questions answered, 0.20 per s, in 0:00:40"]
