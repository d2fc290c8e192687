"""The benchmark of checkpointing policies: it runs, and shows what the policies promise."""

import pytest

from covft.perf.checkpointing import Settings, measure, table

TINY = Settings(depth=8, dim=64, grid=4, tokens=48, rounds=1)


@pytest.fixture(scope="module")
def result() -> dict:
    return measure(TINY)


@pytest.mark.parametrize("stack", ["vit", "llm"])
def test_policies_keep_as_much_as_they_promise(result: dict, stack: str) -> None:
    found = result["stacks"][stack]
    assert list(found) == ["none", "selective", "half", "budget", "full"]
    assert found["none"]["saved_ratio"] == found["none"]["kept_ratio"] == 1
    assert found["full"]["saved_ratio"] <= 0.15 and found["full"]["kept_ratio"] <= 0.16
    assert found["full"]["kept_ratio"] < found["selective"]["kept_ratio"] < 0.75
    assert found["half"]["saved_ratio"] == pytest.approx(0.5, abs=0.06)
    assert 0.35 < found["budget"]["saved_ratio"] <= 0.5 + found["full"]["saved_ratio"]
    assert all(values["error"] < 1e-5 and values["ms"] > 0 for values in found.values())


def test_table_and_conditions(result: dict) -> None:
    text = table(result)
    assert "selective" in text and "ratio" in text and "threads: 1" in text
    assert result["settings"]["depth"] == 8 and result["conditions"]["device"] == "cpu"


@pytest.mark.parametrize("options", [{"dim": 65}, {"rounds": 0}, {"depth": 1}])
def test_wrong_settings(options: dict) -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        measure(Settings(**options))
