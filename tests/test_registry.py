import pytest

from covft.registry import VFT, VISION_BACKBONES, Registry


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
