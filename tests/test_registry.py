from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Optional

import numpy as np
import pytest
from mmengine.config import ConfigDict

from covft.registry import VFT, VISION_BACKBONES, Registry, check_arguments, check_config

if TYPE_CHECKING:
    from covft.engine.runner import Runner


def test_misspelt_name_suggests_the_nearest() -> None:
    with pytest.raises(
        ValueError, match="'SigLip2' is not a vision backbone; did you mean 'SigLIP'"
    ):
        VISION_BACKBONES.build(dict(type="SigLip2"))


def test_unknown_argument_suggests_the_nearest() -> None:
    with pytest.raises(
        ValueError, match="takes no argument 'num_expert'; did you mean 'num_experts'"
    ):
        VFT.build(dict(type="CoVFT", num_expert=2))


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        ({}, ValueError, "'type' is missing"),
        ([1], TypeError, "expected a dict"),
        (dict(type=3), ValueError, "must be a class or a name"),
    ],
)
def test_malformed_configs(cfg: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        VFT.build(cfg)


def test_defaults_give_way_and_configs_are_left_alone() -> None:
    things = Registry("thing")

    @things.register_module()
    class Thing:
        def __init__(self, *, a: int, b: int) -> None:
            self.values = (a, b)

    cfg = dict(type="Thing", a=1)
    assert things.build(cfg, default_args=dict(a=5, b=2)).values == (1, 2)
    assert cfg == dict(type="Thing", a=1)


def test_a_class_without_arguments_takes_none() -> None:
    with pytest.raises(ValueError, match=r"'Freeze' takes no argument 'rank'; it takes none$"):
        VFT.build(dict(type="Freeze", rank=8))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(type="LoRA", rank="8"), r"'LoRA' needs rank: int, got '8' \(str\)"),
        (dict(type="LoRA", rank=8.5), r"'LoRA' needs rank: int, got 8.5 \(float\)"),
        (dict(type="LoRA", rank=True), r"'LoRA' needs rank: int, got True \(bool\)"),
        (dict(type="LoRA", alpha=None), r"'LoRA' needs alpha: float, got None \(NoneType\)"),
        (dict(type="LoRA", dropout=False), "'LoRA' needs dropout: float, got False"),
        (dict(type="CoVFT", num_experts=2.5), "'CoVFT' needs num_experts: int, got 2.5"),
        (dict(type="CoVFT", first_block="1"), "'CoVFT' needs first_block: int or None, got '1'"),
        (dict(type="CoVFT", recompute="yes"), r"'CoVFT' needs recompute: bool, got 'yes' \(str\)"),
        (dict(type="CoVFT", recompute=1), "'CoVFT' needs recompute: bool, got 1"),
        (dict(type="CoVFT", routing=2), "'CoVFT' needs routing: str, got 2"),
    ],
)
def test_values_of_another_type(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VFT.build(cfg)
    with pytest.raises(ValueError, match=message):
        check_config(cfg, VFT)


def test_values_that_count_as_the_type() -> None:
    built = VFT.build(ConfigDict(type="LoRA", rank=np.int64(4), alpha=16, dropout=np.float32(0.5)))
    assert (built.rank, built.alpha) == (4, 16)
    assert VFT.build(dict(type="CoVFT", first_block=None, recompute=np.True_)).recompute


def many(
    runner: Runner,
    *,
    mode: Literal["a", "b"] = "a",
    fields: Mapping[str, int] | None = None,
    size: int | tuple[int, int] = 1,
    old: Optional[float] = 1.0,  # noqa: UP045
    lying: int = None,  # noqa: RUF013
) -> None:
    """Is checked, never called."""


def test_only_simple_annotations_are_checked() -> None:
    given = {"mode": 3, "fields": "x", "size": "x", "old": 2, "lying": None}
    check_arguments(many, {"runner": 0, **given})
    # One that can't be resolved here, Runner, doesn't keep the others from being checked.
    with pytest.raises(ValueError, match="'many' needs old: float or None, got '2'"):
        check_arguments(many, {"runner": 0, "old": "2"})
    with pytest.raises(ValueError, match="'many' needs lying: int, got '2'"):
        check_arguments(many, {"runner": 0, "lying": "2"})


def test_checking_a_config_builds_nothing() -> None:
    things = Registry("thing")

    @things.register_module()
    class Thing:
        def __init__(self, *, a: int, b: int) -> None:
            raise AssertionError("built")

    check_config(dict(type="Thing", a=1), things, {"b": 2})
    with pytest.raises(ValueError, match="'Thing' needs 'b'"):
        check_config(dict(type=Thing, a=1), things)
    with pytest.raises(ValueError, match="'Thin' is not a thing; did you mean 'Thing'"):
        check_config(dict(type="Thin"), things)
