"""The benchmarks of the encoder and of answers, at tiny size."""

import argparse
import json
from typing import Any

import pytest
import torch

from covft.perf import inference, vit_step
from covft.perf.timing import json_line

torch.set_num_threads(1)


def run(module: Any, *arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    tiny = ["--shrink", "--device", "cpu", "--rounds", "1", "--threads", "1"]
    return module.run(parser.parse_args([*tiny, *arguments]))


@pytest.fixture(scope="module")
def vit() -> dict[str, Any]:
    encoders = ["--encoders", "dinov2-s", "clip-l-336"]
    return run(vit_step, *encoders, "--images", "2", "--context-dim", "32")


def test_each_method_on_each_encoder(vit) -> None:
    assert list(vit["encoders"]) == ["dinov2-s", "clip-l-336"]
    for methods in vit["encoders"].values():
        assert list(methods) == ["CoVFT", "Full", "Freeze"]
        full = methods["Full"]
        assert full["step_ratio"] == 1
        for found in methods.values():
            assert found["step_ratio"] == pytest.approx(found["step"] / full["step"])
            assert found["images_per_second"] == pytest.approx(2000 / found["step"])
            work = found["gflop_per_image"] * 2 / 1000
            assert found["tflops"] == pytest.approx(work / (found["step"] / 1000))
            assert found["mfu"] is None
        assert methods["Freeze"]["trainable"] == methods["Freeze"]["saved_mib"] == 0
        assert full["trainable"] > 0 and full["saved_mib"] > 0


def test_encoder_table_and_line(vit) -> None:
    read = json.loads(json_line(vit))
    text = vit_step.table(read)
    assert read["benchmark"] == "vit-step" and "threads: 1" in text
    assert text.count("images/s") == 2 and text.count("CoVFT") == 2


def test_encoder_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"--encoders clip: did you mean 'clip-l-336'"):
        run(vit_step, "--encoders", "clip")
    with pytest.raises(ValueError, match=r"at least 1"):
        run(vit_step, "--images", "0")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"finds no CUDA device"):
            run(vit_step, "--device", "cuda")


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    return run(inference, "--dtype", "float32", "--new-tokens", "3", "--top-k", "1")


def test_answers_by_part(answers) -> None:
    ms = answers["ms"]
    variants = ["CoVFT", "CoVFT, fixed gates", "CoVFT, top-1"]
    towers = [f"tower, {name}" for name in ("Freeze", *variants)]
    assert set(ms) == {
        "text encoder",
        *towers,
        *(f"{what} token, {m}" for what in ("first", "further") for m in ("CoVFT", "Freeze")),
    }
    assert all(ms[name] > 0 for name in ("text encoder", *towers))
    assert list(answers["covft_minus_freeze_ms"]) == variants
    for name, difference in answers["covft_minus_freeze_ms"].items():
        assert difference == pytest.approx(ms[f"tower, {name}"] - ms["tower, Freeze"])
    assert answers["prompt_tokens"] == 60 + 16
    assert answers["gflop_first_token"]["CoVFT"] > answers["gflop_first_token"]["Freeze"]


def test_answers_table_and_line(answers) -> None:
    text = inference.table(json.loads(json_line(answers)))
    for word in ("CoVFT minus Freeze", "fixed gates minus Freeze", "76 tokens", "text encoder"):
        assert word in text


def test_answers_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"--new-tokens 2"):
        run(inference, "--new-tokens", "1")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"finds no CUDA device"):
            run(inference, "--device", "cuda")
