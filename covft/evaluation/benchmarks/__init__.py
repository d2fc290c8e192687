"""The benchmarks, one file per family, and their names on command lines."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from covft.evaluation.benchmark import Benchmark
from covft.evaluation.benchmarks.ai2d import AI2D
from covft.evaluation.benchmarks.captions import COCOCaptions, Flickr30k
from covft.evaluation.benchmarks.cv_bench import CVBench
from covft.evaluation.benchmarks.easy_vqa import EasyVQA
from covft.evaluation.benchmarks.gqa import GQA
from covft.evaluation.benchmarks.icon_qa import IconQA
from covft.evaluation.benchmarks.mmbench import MMBench
from covft.evaluation.benchmarks.mme import MME
from covft.evaluation.benchmarks.mmvp import MMVP
from covft.evaluation.benchmarks.ocr_vqa import OCRVQA
from covft.evaluation.benchmarks.ok_vqa import OKVQA
from covft.evaluation.benchmarks.real_world_qa import RealWorldQA
from covft.evaluation.benchmarks.science_qa import ScienceQA
from covft.evaluation.benchmarks.text_vqa import TextVQA
from covft.registry import BENCHMARKS, nearest

#: The paper's twelve, in its tables' order, as configs by name.
TWELVE: Mapping[str, Mapping[str, Any]] = {
    "mme": dict(type="MME"),
    "mmbench_en": dict(type="MMBench", lang="en"),
    "mmbench_cn": dict(type="MMBench", lang="cn"),
    "gqa": dict(type="GQA"),
    "science_qa": dict(type="ScienceQA"),
    "ai2d": dict(type="AI2D"),
    "text_vqa": dict(type="TextVQA"),
    "mmvp": dict(type="MMVP"),
    "real_world_qa": dict(type="RealWorldQA"),
    "cvbench_coco": dict(type="CVBench", source="COCO"),
    "cvbench_ade": dict(type="CVBench", source="ADE20K"),
    "cvbench_omni3d": dict(type="CVBench", source="Omni3D"),
}
#: Those that the paper fine-tunes on, one at a time.
DOWNSTREAM: Mapping[str, Mapping[str, Any]] = {
    "flickr30k": dict(type="Flickr30k"),
    "coco_captions": dict(type="COCOCaptions"),
    "icon_qa": dict(type="IconQA"),
    "ok_vqa": dict(type="OKVQA"),
    "ocr_vqa": dict(type="OCRVQA"),
}
#: Names that stand for several.
SETS: Mapping[str, Sequence[str]] = {"all": tuple(TWELVE), "downstream": tuple(DOWNSTREAM)}


def named_benchmarks(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the configs of benchmarks by their names, each once.

    Args:
        names: ``Benchmark.name`` of registered ones, ``all`` (the paper's twelve), ``downstream``,
            or a class on the Python path (``pets.Pets``).

    Raises:
        ValueError: If there is no such benchmark, or the class can't be imported.
    """
    known = {**_registered(), **TWELVE, **DOWNSTREAM}
    chosen = [one for name in names for one in SETS.get(name, (name,))]
    for name in chosen:
        if name not in known and "." in name:
            _check_class(name)
            known[name] = dict(type=name)
        elif name not in known:
            raise ValueError(f"no benchmark '{name}'; {nearest(name, [*SETS, *known])}")
    return [dict(known[name]) for name in dict.fromkeys(chosen)]


def _check_class(name: str) -> None:
    module, _, leaf = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), leaf)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"benchmark '{name}' can't be imported: {error}; its module must be on the Python path "
            "(PYTHONPATH=.)"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Benchmark)):
        raise ValueError(f"'{name}' must be a subclass of covft.evaluation.Benchmark, got {kind!r}")


def _registered() -> dict[str, Mapping[str, Any]]:
    """Return what is registered besides the sets, users' own benchmarks included."""
    in_sets = {config["type"] for config in (*TWELVE.values(), *DOWNSTREAM.values())}
    return {
        kind.name: dict(type=key)
        for key, kind in BENCHMARKS.module_dict.items()
        if key not in in_sets
    }


__all__ = [
    "AI2D",
    "DOWNSTREAM",
    "GQA",
    "MME",
    "MMVP",
    "OCRVQA",
    "OKVQA",
    "SETS",
    "TWELVE",
    "COCOCaptions",
    "CVBench",
    "EasyVQA",
    "Flickr30k",
    "IconQA",
    "MMBench",
    "RealWorldQA",
    "ScienceQA",
    "TextVQA",
    "named_benchmarks",
]
