"""Joining the processes that a launcher has started."""

from __future__ import annotations

import os
import shutil
import subprocess

import torch
from mmengine.dist import is_distributed
from torch import distributed

from covft.registry import nearest

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")
_DEFAULT_PORT = "29500"
#: Jobs of Slurm take one of these: below those that systems hand out to clients on their own.
_JOB_PORTS = range(10_000, 30_000)
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
_OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
}


def setup_distributed(launcher: str) -> None:
    """Join the process group that the launcher started; nothing to do for "none".

    Tensors on GPUs are exchanged by NCCL, those on the CPU by gloo. Call it before the dataloader
    is built, which needs to know this process's rank; a second call does nothing.

    Args:
        launcher: "none", "pytorch" (torchrun), "slurm" (srun) or "mpi" (Open MPI's mpirun).

    Raises:
        ValueError: If the launcher is unknown, or didn't set its environment variables.
    """
    if launcher not in LAUNCHERS:
        raise ValueError(f"launcher '{launcher}' is unknown; {nearest(launcher, LAUNCHERS)}")
    if launcher == "none" or is_distributed():
        return
    if launcher == "slurm":
        _translate(_SLURM)
        _find_slurm_master()
    elif launcher == "mpi":
        _translate(_OPEN_MPI)
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise ValueError(
            f"launcher '{launcher}' needs the environment variables {', '.join(missing)}; start "
            "the script through torchrun, srun or mpirun (for several nodes, set MASTER_ADDR to "
            "the name of the first), or use launcher 'none'"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # gloo too: what is offloaded to the CPU is exchanged there.
        distributed.init_process_group("cpu:gloo,cuda:nccl")
    else:
        distributed.init_process_group("gloo")


def _translate(names: dict[str, str]) -> None:
    """Set torchrun's variables from those of another launcher."""
    for name, foreign in names.items():
        if foreign in os.environ:
            os.environ[name] = os.environ[foreign]
    os.environ.setdefault("MASTER_PORT", _port())
    if os.environ.get("WORLD_SIZE") == os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")


def _port() -> str:
    """Return the port at which a job's processes meet: all must find the same, other jobs others.

    Jobs can share a node, and a port can be taken there only once.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    return str(_JOB_PORTS[int(job) % len(_JOB_PORTS)]) if job.isdigit() else _DEFAULT_PORT


def _find_slurm_master() -> None:
    """Name the job's first node as the one that the others connect to."""
    if "MASTER_ADDR" not in os.environ and shutil.which("scontrol"):
        nodes = os.environ.get("SLURM_JOB_NODELIST", "")
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        os.environ["MASTER_ADDR"] = listed.stdout.split()[0]
