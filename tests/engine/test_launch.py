"""Launchers: their environment variables, their scripts, and a run through one of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from covft.config import load_config, save_config
from covft.engine import setup_distributed

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def joined(monkeypatch):
    """Return the list of backends of process groups that were joined; none really is."""
    backends = []
    monkeypatch.setattr(torch.distributed, "init_process_group", backends.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in (*NAMES, "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "to be replaced")
        monkeypatch.delenv(name)
    return backends


def environment():
    return {name: os.environ.get(name) for name in NAMES}


def test_launchers_that_make_no_sense_are_refused(joined):
    with pytest.raises(ValueError, match="did you mean 'pytorch'"):
        setup_distributed("torch")
    with pytest.raises(ValueError, match=r"environment variables RANK.*torchrun"):
        setup_distributed("pytorch")
    setup_distributed("none")
    assert joined == []


def test_slurm_environment_is_translated(joined, monkeypatch):
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    for name, value in {**slurm, "MASTER_ADDR": "node-1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    setup_distributed("slurm")
    assert list(environment().values()) == ["5", "1", "8", "node-1", "29500"]
    assert joined == ["gloo"]


def test_jobs_of_slurm_do_not_share_a_port(joined, monkeypatch):
    slurm = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "MASTER_ADDR": "n"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    ports = []
    for job in ("4711", "4712", "123456789", "4711"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.delenv("MASTER_PORT", raising=False)
        setup_distributed("slurm")
        ports.append(int(os.environ["MASTER_PORT"]))
    assert ports == [14711, 14712, 26789, 14711]
    monkeypatch.setenv("MASTER_PORT", "29601")
    setup_distributed("slurm")
    assert os.environ["MASTER_PORT"] == "29601"


def test_slurm_job_meets_at_its_first_node(joined, monkeypatch, tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "node-[3-4]" ] && printf "node-3\\nnode-4\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}
    for name, value in {**slurm, "SLURM_JOB_NODELIST": "node-[3-4]"}.items():
        monkeypatch.setenv(name, value)
    setup_distributed("slurm")
    assert os.environ["MASTER_ADDR"] == "node-3"


def open_mpi(rank: int, size: int, local_size: int) -> dict[str, str]:
    names = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank, "LOCAL_SIZE": local_size}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}


def test_open_mpi_environment_is_translated(joined, monkeypatch):
    for name, value in open_mpi(3, 4, 4).items():
        monkeypatch.setenv(name, value)
    setup_distributed("mpi")
    assert list(environment().values()) == ["3", "3", "4", "127.0.0.1", "29500"]
    assert joined == ["gloo"]


def test_open_mpi_on_several_nodes_is_told_the_first(joined, monkeypatch):
    for name, value in open_mpi(3, 8, 4).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"MASTER_ADDR; start.*set MASTER_ADDR"):
        setup_distributed("mpi")
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    setup_distributed("mpi")
    assert joined == ["gloo"]


def test_gpus_are_chosen_by_local_rank(joined, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    values = ("9", "1", "16", "node-1", "29500")
    for name, value in zip(NAMES, values, strict=True):
        monkeypatch.setenv(name, value)
    setup_distributed("pytorch")
    assert chosen == [1]
    assert joined == ["cpu:gloo,cuda:nccl"]


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(TOOLS / name), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
    )


def fake_command(folder: Path, name: str) -> Path:
    """Put a command into ``folder`` that prints its arguments, one a line."""
    command = folder / name
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    return command


def test_dist_train_starts_the_processes_of_a_node(tmp_path):
    python = fake_command(tmp_path, "python")
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-1", "MASTER_PORT": "29600"}
    run = run_script(
        "dist_train.sh", "quickstart_covft", "8", "--strategy", "fsdp2", PYTHON=str(python), **nodes
    )
    assert run.stdout.splitlines() == [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--node_rank=1",
        "--master_addr=node-1",
        "--master_port=29600",
        "--nproc_per_node=8",
        str(TOOLS / "train.py"),
        "quickstart_covft",
        "--launcher",
        "pytorch",
        "--strategy",
        "fsdp2",
    ]


@pytest.mark.parametrize(("gpus", "per_node"), [("16", "8"), ("2", "2")])
def test_slurm_train_asks_for_its_gpus(tmp_path, gpus, per_node):
    fake_command(tmp_path, "srun")
    run = run_script(
        "slurm_train.sh",
        *("gpu", "job", "quickstart_covft", "--work-dir", "runs/a b"),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        GPUS=gpus,
        CPUS_PER_TASK="12",
        SRUN_ARGS="--exclusive -t 60",
    )
    arguments = run.stdout.splitlines()
    assert arguments[:4] == ["-p", "gpu", "--job-name=job", f"--gres=gpu:{per_node}"]
    assert f"--ntasks={gpus}" in arguments and f"--ntasks-per-node={per_node}" in arguments
    assert "--cpus-per-task=12" in arguments
    assert (
        arguments[-10:]
        == [
            *("--exclusive", "-t", "60", sys.executable, "-u", str(TOOLS / "train.py")),
            *("quickstart_covft", "--launcher", "slurm"),
            *("--work-dir", "runs/a b"),
        ][-10:]
    )


@pytest.mark.parametrize("name", ["dist_train.sh", "slurm_train.sh"])
def test_scripts_explain_themselves(name):
    run = run_script(name, "quickstart_covft")
    assert run.returncode == 2
    assert f"tools/{name}" in run.stderr


def test_two_processes_train_and_score_a_config(tiny_options, tmp_path):
    options = {**tiny_options, "stages": {"_delete_": True}, "train_cfg.max_iters": 2}
    save_config(load_config("quickstart_covft", options), tmp_path / "tiny.py")
    run = run_script(
        "dist_train.sh",
        *(str(tmp_path / "tiny.py"), "2", "--strategy", "fsdp2"),
        *("--work-dir", str(tmp_path / "run")),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    log = (tmp_path / "run/train.log").read_text()
    assert "2 steps on 2 x cpu, strategy fsdp2" in log
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["benchmarks"]["easy_vqa"]["num_items"] > 0
    assert (tmp_path / "run/weights.safetensors").is_file()
