import argparse
import json
import os
import platform
import sys

import pytest
import torch

from covft.models.checkpointing import saved_bytes
from covft.perf import comoe
from covft.perf.comoe import Settings, measure, table
from covft.perf.malloc import reuse_memory
from covft.perf.timing import (
    conditions,
    interleaved_medians,
    json_line,
    num_threads,
)

TINY = ["--batch", "1", "2", "--rounds", "1", "--dim", "32", "--tokens", "9", "--context-dim", "24"]


@pytest.fixture(scope="module")
def result() -> dict:
    parser = argparse.ArgumentParser()
    comoe.add_arguments(parser)
    return comoe.run(parser.parse_args(TINY))


def test_ours_equals_the_plain_layer(result: dict) -> None:
    assert result["errors"].keys() == {"ours", "ours, recompute"}
    for mode in result["errors"].values():
        assert 0 < max(mode["output"], mode["gradients"]) < 1e-12


def test_json_line_holds_figures_and_conditions(result: dict) -> None:
    line = json_line(result)
    assert "\n" not in line
    read = json.loads(line)
    assert read["benchmark"] == "comoe"
    assert read["settings"] | {"batch": [1, 2], "rounds": 1, "dtype": "float32"} == read["settings"]
    assert {"torch", "cpu", "threads", "malloc", "device"} <= read["conditions"].keys()
    assert read["conditions"]["threads"] == 1
    variants = {"plain", "ours", "ours, recompute"}
    for batch in read["batches"].values():
        assert batch["saved_bytes"].keys() == batch["saved_ratio"].keys() == variants
        for part in ("forward", "forward+backward"):
            assert batch["ms"][part].keys() == batch["speedup"][part].keys() == variants
            assert batch["speedup"][part]["plain"] == 1
            assert min(batch["ms"][part].values()) > 0
        inference = {"plain", "ours", "ours, fixed gates", "ours, top-2", "ours, top-1"}
        assert batch["ms"]["inference"].keys() == inference


def test_saved_bytes_are_those_of_the_formulas(result: dict) -> None:
    images, tokens, dim, experts, heads = 2, 9, 32, 4, 4
    saved = result["batches"][images]["saved_bytes"]
    # What grows with tokens: in both modes the input and CVE's refined image, before and after its
    # LayerNorm with its statistics (mean and rstd), and the attention's weights.
    both = tokens * (3 * dim + 2 + heads)
    hidden = tokens * (experts * 4 * dim + 2 * dim)
    text = 2 * 24  # its residual block's hidden units
    assert saved["ours"] - saved["ours, recompute"] == 4 * images * (hidden + text)
    of_texts = saved["ours, recompute"] - 4 * images * both
    assert 0 < of_texts < 4 * images * 16 * (dim + 24)
    assert saved["ours"] < 0.45 * saved["plain"]
    assert saved["ours, recompute"] < 0.2 * saved["plain"]


def test_table_shows_every_figure(result: dict) -> None:
    text = table(result)
    for word in ("recompute", "forward+backward", "inference", "saved", "malloc", "float64 error"):
        assert word in text
    assert text.count("image(s)") == 2


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), num_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError
    assert torch.get_num_threads() == before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_malloc_is_set_once_and_only_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["tools/benchmark.py", "comoe"])
    reuse_memory()
    (_, arguments, environment), *others = started
    assert arguments == [sys.executable, "tools/benchmark.py", "comoe"] and not others
    monkeypatch.setenv("GLIBC_TUNABLES", environment["GLIBC_TUNABLES"])
    reuse_memory()
    assert len(started) == 1
    stated = conditions(torch.device("cpu"))["malloc"]
    assert stated.startswith("GLIBC_TUNABLES=glibc.malloc.mmap_threshold=")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    reuse_memory()
    assert len(started) == 1
    assert "no effect: malloc is set by the environment" in capsys.readouterr().err


def test_impossible_settings_are_explained() -> None:
    with pytest.raises(ValueError, match=r"at least 1, got .*batch=\(1, 0\)"):
        measure(Settings(batch=(1, 0)))
    with pytest.raises(ValueError, match=r"multiple of CVE's 4 heads, got 50"):
        measure(Settings(context_dim=50))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"no CUDA device; use --device cpu"):
            measure(Settings(device="cuda"))


def test_memory_at_the_size_of_clip_l() -> None:
    settings = Settings()
    layers = comoe._layers(settings, torch.float32)
    x, context = comoe._inputs(settings, 1, torch.float32)
    saved = {
        name: saved_bytes(lambda layer=layer: layer(x, context), excluded=layer.parameters())
        for name, layer in layers.all().items()
    }
    assert 140 * 2**20 < saved["plain"] < 150 * 2**20
    assert saved["ours"] <= 0.40 * saved["plain"]
    assert saved["ours, recompute"] <= 0.14 * saved["plain"]


def test_timings_are_interleaved() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    medians = interleaved_medians(runs, rounds=2, device=torch.device("cpu"))
    assert "".join(order) == "abc" * 3
    assert medians.keys() == {"a", "b", "c"}


def test_saved_bytes_count_each_storage_once_and_no_parameters() -> None:
    x = torch.randn(10, requires_grad=True)
    weight = torch.randn(10, requires_grad=True)
    assert saved_bytes(lambda: (x * x[:10]).sin() * weight) == 4 * 10 * (1 + 1 + 1 + 1)
    assert saved_bytes(lambda: x * weight, excluded=[weight]) == 4 * 10
    with torch.no_grad():
        assert saved_bytes(lambda: x * weight) == 0
