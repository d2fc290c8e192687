"""The package's own modules as flat files that run without the package.

transformers loads a model's code from the Python files beside its weights, follows their relative
imports, and needs no more than those (`trust_remote_code`). An exported folder therefore gets the
modules that its model is made of, taken from the installed package as they are, with imports such
as ``from covft.models.mllm import MLLM`` turned into ``from .models_mllm import MLLM``. A package's
``__init__`` becomes a file only where something imports from it.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from covft import __version__

PACKAGE = "covft"
#: Modules that the files of a bundle get instead of the ones named here: what they'd need more
#: packages for is choosing among parts, and finding weights, which an exported model has done.
STAND_INS = {
    "mmengine": "covft.checkpoints.export.shipped.mmengine_registry",
    "mmengine.registry": "covft.checkpoints.export.shipped.mmengine_registry",
    "covft.weights": "covft.checkpoints.export.shipped.weights",
}
#: Where a shipped module's file is called otherwise than the module.
FILE_NAMES = {
    "covft.checkpoints.export.shipped.mmengine_registry": "mmengine_stand_in",
    "covft.checkpoints.export.shipped.weights": "weights_stand_in",
    "covft.checkpoints.export.shipped.modeling_covft": "modeling_covft",
    "covft.checkpoints.export.shipped.configuration_covft": "configuration_covft",
    "covft.checkpoints.export.shipped.processing_covft": "processing_covft",
}
#: What a machine that runs transformers models on images has; others are imported in a ``try``.
COMMON = frozenset(
    {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "PIL"}
)


@dataclass(frozen=True)
class _Import:
    """An import statement of a module, by its lines (0-based, the last one included)."""

    node: ast.Import | ast.ImportFrom
    first: int
    last: int
    is_lazy: bool
    is_tried: bool

    @property
    def module(self) -> str:
        """The imported module; of several in one statement the first."""
        if isinstance(self.node, ast.ImportFrom):
            return self.node.module or ""
        return self.node.names[0].name


def bundle(
    roots: Iterable[str], *, also: Mapping[str, Iterable[str]] | None = None
) -> dict[str, str]:
    """Return the files that hold modules and everything of the package that they import.

    Args:
        roots: Modules of the package, by their full names.
        also: Further modules, by the root that shall import them: those that only register a class.

    Returns:
        Source texts by file name.

    Raises:
        ValueError: If a module isn't the package's: its file couldn't stand alone.
    """
    also = {} if also is None else also
    files: dict[str, str] = {}
    waiting = list(dict.fromkeys(roots))
    seen = set(waiting)
    while waiting:
        name = waiting.pop()
        text, needed = _flattened(name, tuple(also.get(name, ())))
        files[f"{file_name(name)}.py"] = text
        new = [module for module in needed if module not in seen]
        seen.update(new)
        waiting += new
    return dict(sorted(files.items()))


def file_name(module: str) -> str:
    """Return the name, without ``.py``, of a module's file in a bundle."""
    return FILE_NAMES.get(module) or module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def third_party_imports(text: str) -> set[str]:
    """Return the packages that a source imports outside of ``try`` blocks, as transformers does."""
    return {
        found.module.partition(".")[0]
        for found in _imports(ast.parse(text))
        if not found.is_tried and not (isinstance(found.node, ast.ImportFrom) and found.node.level)
    }


def _flattened(module: str, also: tuple[str, ...]) -> tuple[str, list[str]]:
    """Return a module's rewritten source, and the modules of the bundle that it imports."""
    lines = _source(module).splitlines()
    found = list(_imports(ast.parse("\n".join(lines))))
    needed = [*also]
    for item in reversed(found):
        target = STAND_INS.get(item.module, item.module)
        if target.split(".")[0] == PACKAGE:
            needed.append(target)
            lines[item.first : item.last + 1] = [_relative(item, target, lines[item.first])]
        elif item.is_lazy and not item.is_tried and item.module.split(".")[0] not in COMMON:
            lines[item.first : item.last + 1] = _tried(lines[item.first : item.last + 1])
    if also:
        place = 1 + max(
            i for i, line in enumerate(lines) if line.startswith(("from ", "import ", ")"))
        )
        lines[place:place] = [
            f"from .{file_name(name)} import __name__ as _{file_name(name)}  # registers its class"
            for name in also
        ]
    head = f"# From {PACKAGE} {__version__}: {module}. Written by tools/convert.py."
    return "\n".join([head, *lines, ""]), needed


def _source(module: str) -> str:
    if module.split(".")[0] != PACKAGE:
        raise ValueError(
            f"'{module}' isn't part of {PACKAGE}, so its code can't be put beside the exported "
            "weights; export the model's plain parts, or move the class into the package"
        )
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin).read_text(encoding="utf-8")


def _imports(tree: ast.AST, *, is_lazy: bool = False, is_tried: bool = False) -> Iterator[_Import]:
    """Yield the import statements in their order."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert node.end_lineno is not None
            yield _Import(node, node.lineno - 1, node.end_lineno - 1, is_lazy, is_tried)
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            tried = isinstance(node, ast.Try)
            yield from _imports(node, is_lazy=is_lazy or inside, is_tried=is_tried or tried)


def _relative(item: _Import, target: str, line: str) -> str:
    node = item.node
    assert isinstance(node, ast.ImportFrom), f"write `from {item.module} import ...`"
    names = []
    for alias in node.names:
        submodule = f"{target}.{alias.name}"
        is_module = item.module == target and _is_module(submodule)
        assert not is_module, f"import from {submodule} instead of the module itself"
        names.append(f"{alias.name} as {alias.asname}" if alias.asname else alias.name)
    indent = line[: len(line) - len(line.lstrip())]
    return f"{indent}from .{file_name(target)} import {', '.join(names)}"


def _is_module(name: str) -> bool:
    parent = importlib.util.find_spec(name.rpartition(".")[0])
    if parent is None or not parent.submodule_search_locations:
        return False
    return importlib.util.find_spec(name) is not None


def _tried(lines: list[str]) -> list[str]:
    """Put an optional import in a ``try``: transformers demands every package named outside one."""
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    inner = [f"    {line}" for line in lines]
    return [f"{indent}try:", *inner, f"{indent}except ImportError:", f"{indent}    raise"]
