"""Scripts that import torch once, and their forks: alone, or as a process group (gloo)."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed

from covft.engine import setup_distributed


def run_script(script: Path, *arguments: Any, timeout: float = 300) -> str:
    """Run a script that imports torch once and forks, with the tests' modules; return its stdout.

    It has one thread a process: several share the cores.
    """
    command = [sys.executable, str(script), *map(str, arguments)]
    paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def forked(task: Callable[[], object]) -> int:
    """Call ``task`` in a fork of this process, and return its id.

    It ends with 1 if the task fails. What it prints goes to stderr; stdout is this process's own.
    """
    sys.stdout.flush()  # or both would print what is still there
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(2, 1)
        task()
        status = 0
    finally:
        # The traceback is printed by nobody else: this process is a copy of its parent.
        if status:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class ForkedGroup:
    """A process group whose processes are forks of this one; keep it until they have ended.

    They meet at a store in this process, as torchrun's do: a port that is looked up first, for the
    first of them to listen at, may be somebody else's by then.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def fork(self, rank: int, task: Callable[[], object]) -> int:
        """Call ``task`` in a :func:`forked` process of the group."""

        def work() -> None:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.size}
            store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._store.port}
            agent = {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
            os.environ.update({k: str(v) for k, v in {**names, **store, **agent}.items()})
            setup_distributed("pytorch")
            task()
            distributed.destroy_process_group()

        return forked(work)

    def run(self, task: Callable[[int], object]) -> None:
        """Call ``task(rank)`` in all processes of the group.

        Raises:
            RuntimeError: If one of them fails; its traceback is on stderr.
        """
        children = [self.fork(rank, lambda rank=rank: task(rank)) for rank in range(self.size)]
        failed = [os.waitpid(child, 0)[1] for child in children]
        if any(failed):
            raise RuntimeError(f"processes ended with the states {failed}")
