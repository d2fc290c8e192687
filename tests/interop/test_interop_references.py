"""Running configs without what they import; writing configs."""

import pytest
from torch.optim import AdamW

from covft.config import load_config
from covft.interop.references import Reference, run_config
from covft.interop.source import config_source
from covft.models import CLIP


def written(folder, name: str, text: str):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_imports_become_names_and_arithmetic_is_done(tmp_path):
    text = """
import os.path as osp
import torch
import nowhere.deep.module as deep
from nowhere.models import Net as Other, make
from nowhere import TABLE

root = "data/"
_hidden = 1
model = dict(type=Other, make=make, entry=TABLE.first, dtype=torch.float16, deep=deep.Thing)
path = osp.join(root, "a.json")
length = int(2048 - (336 / 14) ** 2)
"""
    values = run_config(written(tmp_path, "a.py", text))
    names = {key: value.name for key, value in values.pop("model").items()}
    assert names == {
        "type": "nowhere.models.Net",
        "make": "nowhere.models.make",
        "entry": "nowhere.TABLE.first",
        "dtype": "torch.float16",
        "deep": "nowhere.deep.module.Thing",
    }
    assert values == {"root": "data/", "path": "data/a.json", "length": 1472}


def test_relative_bases_are_run(tmp_path):
    (tmp_path / "base").mkdir()
    written(
        tmp_path / "base", "model.py", "from nowhere import Net\nmodel = dict(type=Net, size=1)"
    )
    text = """
from mmengine.config import read_base
with read_base():
    from .base.model import *
    from .base.model import model as _same
model.update(size=2)
"""
    assert run_config(written(tmp_path, "a.py", text)) == {
        "model": {"type": Reference("nowhere.Net"), "size": 2}
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from nowhere import Net\n\nmodel = Net(3)", r"line 3: the config calls nowhere\.Net"),
        ("from nowhere import *", r"line 1: 'from nowhere import \*' isn't read"),
        ("a = 1\nb = unknown", r"line 2: name 'unknown' is not defined"),
        ("a = (", r"a\.py, line 1: "),
    ],
)
def test_what_cannot_be_run_is_explained(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        run_config(written(tmp_path, "a.py", text))


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"no config at 'nowhere\.py'"):
        run_config(__import__("pathlib").Path("nowhere.py"))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("torch.optim.AdamW", "AdamW"),
        ("transformers.CLIPVisionModel.from_pretrained", "CLIPVisionModel.from_pretrained"),
        ("xtuner.dataset.map_fns.llava_map_fn", "llava_map_fn"),
    ],
)
def test_short_names(name, short):
    assert Reference(name).short_name == short


def test_written_config_reads_back(tmp_path):
    config = {
        "model": {"type": CLIP, "arch": "a", "sizes": (1,), "more": [dict(x=1.5), "it's \\ 'q'"]},
        "optim_wrapper": {"optimizer": {"type": AdamW, "betas": (0.9, 0.95)}, "clip_grad": None},
        "train_dataset": {"meta": {"a b": {"root": "中文"}}, "annotations": ["x" * 60, "y" * 60]},
        "seed": 3,
    }
    path = written(tmp_path, "b.py", config_source(config, description='A """quoted"\\ text.'))
    source = path.read_text()
    assert "from torch.optim import AdamW\n\nfrom covft.models import CLIP\n" in source
    assert max(len(line) for line in source.splitlines()) <= 100
    loaded = load_config(path)
    assert loaded.model.type is CLIP and loaded.optim_wrapper.optimizer.type is AdamW
    assert loaded.model.sizes == (1,) and loaded.model.more == config["model"]["more"]
    assert loaded.train_dataset.to_dict() == config["train_dataset"]
    assert loaded.optim_wrapper.clip_grad is None and loaded.seed == 3
