"""The data of an xtuner 0.2 config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from covft.datasets import InstructDataset, InternVLDataset, MixtureDataset
from covft.interop.section import Section
from covft.interop.xtuner_model import INTERNVL_TILES, prompt_template


def datasets_of(loader: Section) -> list[Section]:
    """Return the data sets of a ``train_dataloader``, those inside a ConcatDataset one by one."""
    dataset = loader.section("dataset")
    if dataset is None:
        raise ValueError("train_dataloader.dataset is missing")
    known = {name: name for name in ("LLaVADataset", "InternVL_V1_5_Dataset", "ConcatDataset")}
    if dataset.kind(known) != "ConcatDataset":
        return [dataset]
    parts = []
    for index, values in enumerate(dataset.take("datasets")):
        part = Section(values, f"{dataset.path}.datasets[{index}]", dataset.notes)
        part.kind({name: name for name in known if name != "ConcatDataset"})
        parts.append(part)
    dataset.finish()
    return parts


def template_of(datasets: Sequence[Section], override: str | None, notes: list[str]) -> Any:
    """Return our template for the one that all data sets have, or ``override``."""
    found: dict[str, Any] = {}
    for dataset in datasets:
        mapping = dataset.section("template_map_fn")
        if mapping is not None:
            mapping.kind({"template_map_fn_factory": None})
            name = mapping.take("template")
            mapping.finish()
        else:
            name = dataset.take("template")
        found.setdefault(str(name), name)
    if len(found) > 1:
        raise ValueError(f"the datasets have different templates ({', '.join(found)}); use one")
    return prompt_template(next(iter(found.values())), override, "template", notes)


def convert_datasets(datasets: Sequence[Section], tokens: int | None) -> dict[str, Any]:
    """Convert the data sets to ``train_dataset``.

    Args:
        datasets: Those of :func:`datasets_of`.
        tokens: What an image takes, if known.

    Raises:
        ValueError: If they make images square in different ways.
    """
    members: dict[str, dict[str, Any]] = {}
    squares: dict[str, dict[str, Any]] = {}
    for dataset in datasets:
        tiled = "data_paths" in dataset
        names = ("data_paths", "image_folders") if tiled else ("data_path", "image_folder")
        paths, folders = (_as_list(dataset.take(name, "")) for name in names)
        if len(folders) == 1:
            folders *= len(paths)
        if len(paths) != len(folders):
            raise ValueError(f"{dataset.path}: {len(paths)} data paths, {len(folders)} folders")
        options = _tiling(dataset) if tiled else _squares(dataset, tokens)
        square: dict[str, Any] = {
            key: options.pop(key) for key in ("resize", "max_tiles") if key in options
        }
        squares.setdefault(str(square), square)
        for path, folder in zip(paths, folders, strict=True):
            source = {"annotations": path, "image_root": folder}
            members[f"{len(members)}_{Path(path).stem}"] = {**source, **options}
        dataset.finish()
    if len(squares) > 1:
        raise ValueError(
            f"the datasets make images square in different ways ({' and '.join(squares)}); a model "
            "is asked in one way"
        )
    return _joined(members, next(iter(squares.values())))


def _joined(members: Mapping[str, dict[str, Any]], square: Mapping[str, Any]) -> dict[str, Any]:
    """Return one data set, as simple as the members allow."""
    own = {"annotations", "image_root"}
    rest = [{k: v for k, v in member.items() if k not in own} for member in members.values()]
    if "weight" in rest[0] or any(options != rest[0] for options in rest):
        parts = {name: {"type": InstructDataset, **member} for name, member in members.items()}
        return {"type": MixtureDataset, **square, "datasets": parts}
    roots = {member["image_root"] for member in members.values()}
    if len(roots) == 1:
        files = [member["annotations"] for member in members.values()]
        annotations = files[0] if len(files) == 1 else files
        source = {"annotations": annotations, "image_root": roots.pop()}
        return {"type": InstructDataset, **source, **square, **rest[0]}
    meta = {
        name: {"root": member["image_root"], "annotation": member["annotations"]}
        for name, member in members.items()
    }
    return {"type": InternVLDataset, "meta": meta, **square, **rest[0]}


def _as_list(value: Any) -> list[str]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _squares(dataset: Section, tokens: int | None) -> dict[str, Any]:
    """Return the options of a LLaVADataset; xtuner counts text alone in ``max_length``."""
    dataset.kind({"llava_map_fn": None}, key="dataset_map_fn")
    for key in ("tokenizer", "image_processor"):
        dataset.take(key, None)  # those of the model
    length = dataset.take("max_length", 2048)
    if tokens is None:
        dataset.note("max_length", length, "here images count, too: add their tokens")
    options: dict[str, Any] = {"max_length": length + (tokens or 0)}
    if dataset.take("pad_image_to_square", False):
        options["resize"] = "pad"
    dataset.expect(max_dataset_length=None, offline_processed_text_folder=None)
    return options


def _tiling(dataset: Section) -> dict[str, Any]:
    dataset.take("model_path", None)
    repeats = dataset.take("repeat_times", 1)
    return {
        "resize": "tiles",
        "max_tiles": INTERNVL_TILES,
        "max_length": dataset.take("max_length", 8192),
        **({} if repeats == 1 else {"weight": repeats}),
    }


def convert_dataloader(loader: Section) -> dict[str, Any]:
    """Convert the rest of a ``train_dataloader``."""
    converted: dict[str, Any] = {
        "batch_size": loader.take("batch_size"),
        "num_workers": loader.take("num_workers", 0),
    }
    sampler = loader.section("sampler")
    if sampler is not None:
        kind = sampler.kind({"LengthGroupedSampler": "grouped", "DefaultSampler": "random"})
        if kind == "grouped":
            groups = {"modality_length": "modality_length", "length": "length"}
            converted["group"] = sampler.kind(groups, key="length_property")
            sampler.take("per_device_batch_size", None)  # a whole step's, always
        elif not sampler.take("shuffle", True):
            converted["shuffle"] = False
        sampler.expect(seed=None, mega_batch_mult=None, round_up=True)
        sampler.finish()
    for key in ("collate_fn", "pin_memory", "persistent_workers", "drop_last"):
        loader.take(key, None)  # how batches come about, not what is in them
    loader.finish()
    return converted
