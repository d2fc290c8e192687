"""``load_from`` of a config: public checkpoints beside the project's own files."""

import warnings

import pytest
import torch
from mmengine.config import Config
from public_models import hf_llava, llava_files, our_llava, random_llava, save

from covft.checkpoints.run import load_start
from covft.checkpoints.trainable import save_weights


def start(model, path):
    load_start(model, Config(dict(load_from=str(path))))


def test_a_folder_of_transformers(tmp_path):
    hf_llava().save_pretrained(tmp_path)
    model = our_llava()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(model, tmp_path)
    table = hf_llava().state_dict()["model.language_model.embed_tokens.weight"]
    assert torch.equal(model.llm.model.model.embed_tokens.weight, table[:90])


def test_a_projector_leaves_the_rest_and_says_what_is_random(tmp_path):
    save(tmp_path, llava_files()["mm_projector"], name="mm_projector.bin")
    model = our_llava()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="holds no llm and no vision, which the config leaves"):
        start(model, tmp_path / "mm_projector.bin")
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {name for name in before if name.startswith("projector.")}


def test_own_files_stay_own_files(tmp_path):
    trained, model = random_llava(), our_llava()
    (tmp_path / "stage").mkdir()
    save_weights(trained, tmp_path / "stage" / "weights.safetensors", metadata={})
    # A stage's folder may also hold an export; its own weights count.
    save(tmp_path / "stage", llava_files()["llava"])
    torch.save({"state_dict": trained.state_dict(), "meta": {}}, tmp_path / "iter_3.pth")
    for path in (
        tmp_path / "stage",
        tmp_path / "stage" / "weights.safetensors",
        tmp_path / "iter_3.pth",
    ):
        model = our_llava()
        start(model, path)
        for name, value in trained.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name


def test_nothing_to_load(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights in .*: expected one of model\.safe"):
        start(our_llava(), tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        start(our_llava(), tmp_path / "absent.pth")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        start(our_llava(), tmp_path / "notes.txt")
