"""JSON files of benchmarks as rows: records in a list, or under their ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covft.evaluation.tables import Row, read_json


def listed_records(path: Path, key: str) -> list[Row]:
    """Read ``{key: [{...}, ...]}``; a record that is no object is a row with a problem.

    Raises:
        ValueError: If the file is missing, no JSON, or has no such list with something in it.
    """
    content = read_json(path)
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list) or not records:
        found = ", ".join(map(repr, content)) if isinstance(content, dict) else type(content)
        raise ValueError(f"{path} has no list '{key}' of records; found {found or 'nothing'}")
    return [_row(f"{path.name}, {key} {n}", n, cells) for n, cells in enumerate(records, start=1)]


def keyed_records(path: Path) -> dict[str, Row]:
    """Read ``{id: {...}, ...}``; a record that is no object is a row with a problem.

    Returns:
        The rows by id, which is also their cell "id".

    Raises:
        ValueError: If the file is missing, no JSON, or holds no records by id.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold records by id, found {type(content).__name__}")
    return {
        record_id: _row(f"{path.name}, '{record_id}'", number, cells, id=record_id)
        for number, (record_id, cells) in enumerate(content.items())
    }


def _row(where: str, number: int, cells: Any, **more: str) -> Row:
    if not isinstance(cells, Mapping):
        return Row(where, number, more, problem=f"no object, but {cells!r:.60}")
    return Row(where, number, {**cells, **more})
