"""Checkpoints: what they hold, exact resume, and what happens when they don't fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from safetensors.torch import load_file
from torch import nn
from toy_training import ToyDataset, ToyModel, exact_scalars, toy_dataloader, toy_runner

from covft.atomic import set_aside
from covft.engine import load_weights
from covft.engine.checkpoint_files import find_checkpoints, read_checkpoint
from covft.engine.scalars_hook import read_scalars

torch.set_num_threads(1)
EVERY_3 = {"type": "CheckpointHook", "interval": 3, "max_keep": 3}


class StopAt(Hook):
    """Ends a run like a kill between two steps: nothing is saved at the end."""

    def __init__(self, step):
        self.step = step

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if batch_idx + 1 == self.step:
            raise KeyboardInterrupt


def interrupted(work_dir, step, **parts):
    with pytest.raises(KeyboardInterrupt):
        toy_runner(work_dir, hooks=[EVERY_3, StopAt(step)], **parts).train()


def weights_of(work_dir):
    return load_file(work_dir / "weights.safetensors")


def assert_same_run(one, other):
    assert exact_scalars(one) == exact_scalars(other)
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_run_equals_uninterrupted_one_bit_for_bit(tmp_path, num_workers):
    def parts():
        return {"dataloader": toy_dataloader(num_workers=num_workers)}

    toy_runner(tmp_path / "whole", hooks=[EVERY_3], **parts()).train()
    interrupted(tmp_path / "cut", 8, **parts())
    assert len(read_scalars(tmp_path / "cut/scalars.jsonl")) == 8  # 7 and 8 will be repeated
    torch.manual_seed(99)  # whatever the new process drew before
    resumed = toy_runner(tmp_path / "cut", hooks=[EVERY_3], resume=True, seed=0, **parts())
    assert resumed.iter == 6
    resumed.train()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    losses = [record["loss"] for record in read_scalars(tmp_path / "cut/scalars.jsonl")]
    assert len(set(losses)) == 12


def test_dropout_matters_to_the_resume_test(tmp_path):
    for seed in (0, 1):
        toy_runner(tmp_path / f"seed{seed}", seed=seed).train()
    assert exact_scalars(tmp_path / "seed0") != exact_scalars(tmp_path / "seed1")


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    toy_runner(tmp_path, hooks=[EVERY_3]).train()
    before = exact_scalars(tmp_path), weights_of(tmp_path)
    toy_runner(tmp_path, hooks=[EVERY_3], resume=True).train()
    assert exact_scalars(tmp_path) == before[0]
    assert all(torch.equal(weights_of(tmp_path)[name], value) for name, value in before[1].items())


def test_checkpoint_holds_what_training_changes_and_nothing_else(tmp_path):
    toy_runner(tmp_path, max_iters=3, hooks=[EVERY_3], config_text="a = 1").train()
    state = read_checkpoint(tmp_path / "iter_3.pth")
    names = set(state["state_dict"])
    assert "embed.weight" not in names  # frozen
    assert {"vision.0.weight", "llm.bias", "calls"} <= names
    assert names == set(ToyModel().state_dict()) - {"embed.weight"} == set(weights_of(tmp_path))
    meta = state["meta"]
    assert (meta["iter"], meta["world_size"], meta["config"]) == (3, 1, "a = 1")
    assert meta["parameters"]["llm.weight"] == [17, 8]
    assert (tmp_path / "last_checkpoint").read_text() == "iter_3.pth"


def test_tied_weights_are_saved_under_both_names(tmp_path):
    model = ToyModel()
    model.head = nn.Linear(8, 17)
    model.head.weight = model.llm.weight
    toy_runner(tmp_path, max_iters=3, model=model, hooks=[EVERY_3]).train()
    saved = weights_of(tmp_path)
    assert torch.equal(saved["head.weight"], saved["llm.weight"])


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    hook = {"type": "CheckpointHook", "interval": 2, "max_keep": 2, "save_last": False}
    toy_runner(tmp_path, max_iters=9, hooks=[hook]).train()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["iter_8.pth", "iter_6.pth"]


def damage_tail(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_one_weight(path):
    content = bytearray(path.read_bytes())
    weight = read_checkpoint(path)["state_dict"]["llm.weight"].numpy().tobytes()
    place = content.index(weight)
    content[place] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_tail, damage_one_weight, empty])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    toy_runner(tmp_path / "whole", hooks=[EVERY_3]).train()
    interrupted(tmp_path / "cut", 8)
    damage(tmp_path / "cut/iter_6.pth")
    resumed = toy_runner(tmp_path / "cut", hooks=[EVERY_3], resume=True)
    assert resumed.iter == 3
    log = (tmp_path / "cut/train.log").read_text()
    assert "iter_6.pth can't be read" in log
    assert "falling back" in log
    resumed.train()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_resume_names_the_unreadable_checkpoint_that_was_asked_for(tmp_path):
    (tmp_path / "iter_6.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"iter_6\.pth can't be read"):
        toy_runner(tmp_path / "run", resume=tmp_path / "iter_6.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        toy_runner(tmp_path / "run", resume=tmp_path / "iter_7.pth")


def test_resume_from_an_older_checkpoint_leaves_the_newer_ones_aside(tmp_path):
    toy_runner(tmp_path / "whole", hooks=[EVERY_3]).train()
    interrupted(tmp_path / "cut", 8)
    toy_runner(tmp_path / "cut", hooks=[EVERY_3], resume=tmp_path / "cut/iter_3.pth").train()
    assert (tmp_path / "cut/iter_6.pth.old1").exists()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_what_is_set_aside_overwrites_nothing(tmp_path):
    for seed in (0, 1, 2):
        interrupted(tmp_path, 4, seed=seed)
    weights = [
        read_checkpoint(tmp_path / f"iter_3.pth{end}")["state_dict"]["llm.weight"]
        for end in (".old1", ".old2", "")
    ]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_last_checkpoint_is_never_one_that_was_set_aside(tmp_path):
    interrupted(tmp_path, 8)
    assert (tmp_path / "last_checkpoint").read_text() == "iter_6.pth"
    toy_runner(tmp_path, resume=tmp_path / "iter_3.pth")
    assert (tmp_path / "last_checkpoint").read_text() == "iter_3.pth"
    toy_runner(tmp_path)
    assert not (tmp_path / "last_checkpoint").exists()


def test_files_of_several_are_set_aside_under_one_number(tmp_path):
    one, two, none = (tmp_path / name for name in ("one", "two", "none"))
    one.mkdir()
    two.write_text("new")
    (tmp_path / "two.old1").write_text("old")
    pairs = [(one, tmp_path / "one.old2"), (two, tmp_path / "two.old2")]
    assert set_aside([one, two, none]) == pairs
    assert (tmp_path / "two.old1").read_text() == "old"
    assert (tmp_path / "two.old2").read_text() == "new"


def test_fresh_run_in_a_used_folder_is_not_mixed_up_with_the_old_one(tmp_path):
    toy_runner(tmp_path, hooks=[EVERY_3]).train()
    interrupted(tmp_path, 2, seed=5)
    assert find_checkpoints(tmp_path) == []
    assert (tmp_path / "iter_12.pth.old1").exists()
    assert not (tmp_path / "weights.safetensors").exists()
    assert len(read_scalars(tmp_path / "scalars.jsonl")) == 2
    assert toy_runner(tmp_path, resume=True).iter == 0


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    leftover = tmp_path / ".iter_3.pth.123.partial"
    leftover.write_bytes(b"half")
    toy_runner(tmp_path, resume=True)
    assert not leftover.exists()


def test_checkpoint_of_another_architecture_is_refused_with_a_list(tmp_path):
    interrupted(tmp_path, 4)
    model = ToyModel()
    model.projector = nn.Linear(8, 8, bias=False)
    model.extra = nn.Linear(2, 2)
    model.llm = nn.Linear(8, 5)
    with pytest.raises(ValueError, match="doesn't fit the model") as error:
        toy_runner(tmp_path, model=model, resume=True)
    message = str(error.value)
    assert "2 missing in the file:\n  extra.bias\n  extra.weight" in message
    assert "1 not in the model:\n  projector.bias" in message
    assert "llm.weight: (17, 8) in the file, (5, 8) in the model" in message


def test_long_lists_are_cut_and_counted(tmp_path):
    interrupted(tmp_path, 4)
    model = ToyModel()
    model.more = nn.ModuleList([nn.Linear(1, 1) for _ in range(7)])
    with pytest.raises(ValueError, match=r"14 missing in the file") as error:
        toy_runner(tmp_path, model=model, resume=True)
    assert str(error.value).count("  more.") == 10
    assert "... and 4 more" in str(error.value)


def test_changed_parameter_groups_are_refused_and_changed_values_taken(tmp_path):
    interrupted(tmp_path, 4)
    grouped = {"optimizer": {"type": "AdamW", "lr": 1e-2}, "lr": {"projector": 1e-3}}
    with pytest.raises(ValueError, match=r"base \(7 parameters\)|base \(8 parameters\)"):
        toy_runner(tmp_path, optim_wrapper=grouped, resume=True)
    lower = {"optimizer": {"type": "AdamW", "lr": 1e-4}}
    runner = toy_runner(tmp_path, optim_wrapper=lower, resume=True, config_text="lr = 1e-4")
    now = runner.optim_wrapper.optimizer.param_groups[0]["lr"]
    assert now == pytest.approx(1e-4 * runner.param_schedulers[0].factor(3))
    assert "+lr = 1e-4" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"type": "Adam"}, r"its optimizer is AdamW\(amsgrad=False\), the config asks for Adam\("),
        ({"type": "AdamW", "amsgrad": True}, r"asks for AdamW\(amsgrad=True\)"),
        (
            {"type": "BF16AdamW", "moments": "float32"},
            r"BF16AdamW\(master='low_half', moments='float32'\).*same optim_wrapper\.optimizer",
        ),
    ],
)
def test_another_optimizer_is_refused(tmp_path, optimizer, message):
    interrupted(tmp_path, 4)
    with pytest.raises(ValueError, match=message):
        toy_runner(tmp_path, optim_wrapper={"optimizer": {"lr": 1e-2, **optimizer}}, resume=True)


def test_another_size_of_a_step_is_refused(tmp_path):
    interrupted(tmp_path, 4)
    message = r"with 4 samples per step, now there are 8: .*batch_size.*accumulation.*processes"
    with pytest.raises(ValueError, match=message):
        toy_runner(tmp_path, dataloader=toy_dataloader(batch_size=4), resume=True)
    same = toy_dataloader(batch_size=4, accumulation=1)
    train_cfg = {"accumulation": 1}
    assert toy_runner(tmp_path, dataloader=same, train_cfg=train_cfg, resume=True).iter == 3
    assert "another order" not in (tmp_path / "train.log").read_text()


def test_another_number_of_samples_is_told(tmp_path):
    interrupted(tmp_path, 4)
    toy_runner(tmp_path, dataloader=toy_dataloader(ToyDataset(30)), resume=True)
    assert "on 40 samples, now there are 30" in (tmp_path / "train.log").read_text()


def test_stage_two_starts_from_the_weights_of_stage_one_in_one_process(tmp_path):
    first = ToyModel()
    first.vision.requires_grad_(False)
    toy_runner(tmp_path / "first", model=first, max_iters=4).train()
    second = ToyModel(seed=3)
    untouched = second.vision[0].weight.clone()
    loaded = load_weights(second, tmp_path / "first")
    assert loaded == ["calls", "llm.bias", "llm.weight", "projector.bias", "projector.weight"]
    assert torch.equal(second.llm.weight, first.llm.weight)
    assert torch.equal(second.vision[0].weight, untouched)
    runner = toy_runner(tmp_path / "second", model=second, max_iters=4)
    assert len(runner.message_hub.log_scalars) == 0
    runner.train()
    assert len(read_scalars(tmp_path / "second/scalars.jsonl")) == 4
    assert "second" not in (tmp_path / "first/train.log").read_text()


def test_load_weights_takes_checkpoints_and_refuses_what_does_not_fit(tmp_path):
    interrupted(tmp_path / "run", 4)
    with pytest.raises(FileNotFoundError, match="isn't finished"):
        load_weights(ToyModel(), tmp_path / "run")
    model = ToyModel(seed=7)
    load_weights(model, tmp_path / "run/iter_3.pth")
    saved = read_checkpoint(tmp_path / "run/iter_3.pth")["state_dict"]
    assert torch.equal(model.llm.weight, saved["llm.weight"])
    model.llm = nn.Linear(8, 5)
    del model.projector
    with pytest.raises(ValueError, match="2 not in the model"):
        load_weights(model, tmp_path / "run/iter_3.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="neither"):
        load_weights(ToyModel(), tmp_path / "text.pth")


def test_message_hub_survives(tmp_path):
    interrupted(tmp_path, 4)
    hub = toy_runner(tmp_path, resume=True).message_hub
    losses = [record["loss"] for record in read_scalars(tmp_path / "scalars.jsonl")]
    assert hub.get_scalar("train/loss").data[0].tolist() == losses[:3]


def test_run_folder_can_be_moved(tmp_path):
    interrupted(tmp_path / "here", 4)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert toy_runner(tmp_path / "there", resume=True).iter == 3


def test_torn_scalar_line_is_dropped(tmp_path):
    interrupted(tmp_path, 4)
    with Path(tmp_path / "scalars.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    toy_runner(tmp_path, resume=True).train()
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "scalars.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 13))


def test_torn_line_of_the_bad_samples_is_listed_again(tmp_path):
    def dataloader():
        return toy_dataloader(ToyDataset(bad=tuple(range(0, 40, 3))))

    def listed():
        lines = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
        return [json.loads(line)["id"] for line in lines]

    interrupted(tmp_path, 5, dataloader=dataloader())
    first = listed()
    assert len(first) > 2
    path = tmp_path / "bad_samples.jsonl"
    path.write_text(path.read_text()[:-10])
    for step in (7, 9):  # the second resume reads what the first has written behind the torn line
        with pytest.raises(KeyboardInterrupt):
            hooks = [EVERY_3, StopAt(step)]
            toy_runner(tmp_path, dataloader=dataloader(), hooks=hooks, resume=True).train()
        assert len(listed()) == len(set(listed()))
        assert set(first[:-1]) <= set(listed())


def test_weights_of_another_kind_of_file(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no checkpoint of this project: it has no 'state_dict'"):
        load_weights(ToyModel(), tmp_path / "other.pth")
