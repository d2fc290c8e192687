import shutil
from pathlib import Path

import pytest

from covft.config import CONFIG_ROOT, config_text, load_config, save_config, stage_configs
from covft.vft import CoVFT, Freeze, Full


def test_by_name_and_by_path() -> None:
    by_name = load_config("quickstart_covft")
    by_path = load_config(CONFIG_ROOT / "quickstart_covft.py")
    assert by_name.to_dict() == by_path.to_dict()


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'quickstart_covft'"):
        load_config("quickstart_cvft")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_cgf = dict()", "unknown config key 'train_cgf'; did you mean 'train_cfg'"),
        ("stages = dict(a=dict(modl=1))", "stages.a: unknown config key 'modl'.*'model'"),
    ],
)
def test_unknown_keys(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_backbone.type": "SigLIP"}, "set model.vision.backbone"),
        ({"modle.x": 1}, "did you mean 'model'"),
        ({"no_such.x": 1}, "unknown config key 'no_such'"),
    ],
)
def test_options_without_effect(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("quickstart_covft", options)


def test_option_that_every_stage_overrides(tmp_path: Path) -> None:
    path = tmp_path / "two.py"
    path.write_text(
        "train_cfg = dict(max_iters=1)\n"
        "stages = dict(a=dict(train_cfg=dict(max_iters=2)), b=dict(train_cfg=dict(max_iters=3)))\n"
    )
    with pytest.raises(ValueError, match=r"Use stages\.a\.train_cfg\.max_iters, stages\.b"):
        load_config(path, {"train_cfg.max_iters": 5})
    cfg = load_config(path, {"stages.b.train_cfg.max_iters": 5})
    assert [stage.train_cfg.max_iters for _, stage in stage_configs(cfg)] == [2, 5]


def test_stages_override_the_base_and_leave_it_alone() -> None:
    cfg = load_config("quickstart_covft")
    before = config_text(cfg)
    (first, pretrain), (second, finetune) = stage_configs(cfg)
    assert (first, second) == ("pretrain", "finetune")
    assert pretrain.model.vision.vft.type is Freeze and pretrain.model.llm.freeze
    assert finetune.model.vision.vft.type is CoVFT and "freeze" not in finetune.model.llm
    assert pretrain.train_dataset.kind == "captions"
    assert "stages" not in finetune and "evaluation" not in finetune
    assert config_text(cfg) == before


def test_saved_config_reads_back_the_same(tmp_path: Path) -> None:
    cfg = load_config("quickstart_covft", {"train_cfg.max_iters": 7})
    save_config(cfg, tmp_path / "config.py")
    again = load_config(tmp_path / "config.py")
    assert again.to_dict() == cfg.to_dict()
    assert list(again.stages) == ["pretrain", "finetune"]


def test_twins_differ_in_the_method_alone() -> None:
    configs = {name: load_config(f"quickstart_{name}") for name in ("covft", "freeze", "full")}
    assert configs["freeze"].model.vision.vft.type is Freeze
    assert configs["full"].model.vision.vft.type is Full
    for cfg in configs.values():
        cfg.model.vision.pop("vft")
    assert configs["covft"].to_dict() == configs["freeze"].to_dict() == configs["full"].to_dict()


def test_standard_library_imports_in_configs(tmp_path: Path) -> None:
    path = tmp_path / "stdlib.py"
    path.write_text(
        "from mmengine.config import read_base\n"
        "import math\n"
        "with read_base():\n    from .base import *\n"
        "seed = math.floor(2.5)\n"
    )
    (tmp_path / "base.py").write_text("train_cfg = dict(max_iters=1)\n")
    cfg = load_config(path)
    assert cfg.seed == 2 and cfg.train_cfg.max_iters == 1


def test_import_line_swaps_the_encoder(tmp_path: Path) -> None:
    shutil.copytree(CONFIG_ROOT, tmp_path / "configs")
    recipe = tmp_path / "configs" / "quickstart_covft.py"
    recipe.write_text(recipe.read_text().replace("dinov2_small", "siglip_l_384"))
    backbone = load_config(recipe).model.vision.backbone
    assert backbone.type.__name__ == "SigLIP" and "grid" not in backbone
