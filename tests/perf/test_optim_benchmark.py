"""The benchmark of optimizers: updates that are kept and lost, bytes."""

import pytest

from covft.perf.optim import Settings, measure, table


@pytest.fixture(scope="module")
def result() -> dict:
    return measure(Settings(size=20_000, rounds=1))


def test_updates_that_bfloat16_loses_are_kept(result: dict) -> None:
    found = result["optimizers"]
    kept = {name: values["kept"] for name, values in found.items()}
    assert kept.pop("fp32") == pytest.approx(1)
    assert kept.pop("bf16") < 0.25
    assert len(kept) >= 2 and all(0.99 <= value <= 1.01 for value in kept.values()), kept
    assert kept["bf16, low_half, float32"] == pytest.approx(1, abs=1e-6)
    for values in found.values():
        assert values["kept"] == pytest.approx(values["projection"] / values["length"])


def test_bytes_are_those_of_weight_gradient_and_state(result: dict) -> None:
    found = {name: one["bytes_per_parameter"] for name, one in result["optimizers"].items()}
    expected = {
        "fp32": 16,
        "bf16": 8,
        "bf16, low_half, float32": 14,
        "bf16, stochastic, float32": 12,
    }
    if "bf16, low_half, 8bit" in found:
        expected |= {"bf16, low_half, 8bit": 8.03, "bf16, stochastic, 8bit": 6.03}
    # The counters of steps are tensors in PyTorch's optimizers.
    assert found == pytest.approx(expected, abs=0.005)


def test_table_and_conditions(result: dict) -> None:
    text = table(result)
    assert "projection / length" in text and "low_half" in text
    assert result["conditions"]["threads"] == 1 and result["settings"]["steps"] == 200


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        measure(Settings(steps=0))
