"""Running a Python config without the packages that it imports.

The config's own statements are run, as mmengine does; whatever it imports from outside the standard
library becomes a :class:`Reference`, a name and nothing else. So a config of a framework that isn't
installed, or not for these versions of its dependencies, can be read.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class Reference:
    """Something that a config names by an import, such as ``torch.optim.AdamW``."""

    def __init__(self, name: str) -> None:
        #: The dotted name.
        self.name = name

    def __getattr__(self, attribute: str) -> Reference:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return Reference(f"{self.name}.{attribute}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to be called, unless it's mmengine's ``read_base``."""
        if self.name.endswith(".read_base"):
            return contextlib.nullcontext()
        raise ValueError(
            f"the config calls {self.name}(...), which isn't run here; write dict(type=..., ...)"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reference) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return self.name

    @property
    def short_name(self) -> str:
        """The name without its modules: ``AdamW``, ``CLIPVisionModel.from_pretrained``."""
        parts = self.name.split(".")
        first = next((i for i, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
        return ".".join(parts[first:])


def run_config(path: Path) -> dict[str, Any]:
    """Run a config file.

    Args:
        path: The file; relative imports in it are run, too.

    Returns:
        What it defines; imported names are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it can't be run; the message holds the file and the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no config at '{path}'")
    return {
        name: value
        for name, value in _run(path).items()
        if not name.startswith("_") and not _is_imported(value)
    }


def _run(path: Path) -> dict[str, Any]:
    def import_name(
        name: str,
        globals_: Mapping[str, Any] | None = None,
        locals_: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if level:
            return _neighbour(path, name, level)
        if name.split(".")[0] in sys.stdlib_module_names:
            return builtins.__import__(name, globals_, locals_, fromlist or (), level)
        if fromlist and "*" in fromlist:
            raise ValueError(f"'from {name} import *' isn't read; import names, or a relative file")
        return Reference(name if fromlist else name.split(".")[0])

    scope: dict[str, Any] = {
        "__builtins__": {**vars(builtins), "__import__": import_name},
        "__file__": str(path),
        "__name__": path.stem,
    }
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
    except Exception as error:
        raise ValueError(f"{path}, line {_line(error, path)}: {error}") from error
    return {name: value for name, value in scope.items() if not name.startswith("__")}


def _neighbour(path: Path, name: str, level: int) -> ModuleType:
    """Run the config of a relative import; return it as a module."""
    folder = path.resolve().parents[level - 1]
    module = ModuleType(name)
    vars(module).update(_run(folder.joinpath(*name.split(".")).with_suffix(".py")))
    return module


def _line(error: Exception, path: Path) -> int | str:
    if isinstance(error, SyntaxError):
        return error.lineno or "?"
    line: int | str = "?"
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def _is_imported(value: Any) -> bool:
    return isinstance(value, (Reference, ModuleType)) or callable(value)
