"""Downloaded archives of benchmarks, unpacked to where the benchmarks look for their files.

Of the archives' images only those are unpacked that a benchmark asks about: of GQA's 148,854 images
that is 398, of COCO's 40,504 about 10,000.
"""

from __future__ import annotations

import lzma
import re
import shutil
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from covft.evaluation.benchmark import Benchmark
from covft.evaluation.benchmarks.mme import COGNITION, PERCEPTION

_SUBTASKS = "|".join((*PERCEPTION, *COGNITION))


@dataclass(frozen=True)
class Rule:
    """Where a file of an archive belongs.

    Attributes:
        member: What its path in the archive ends with, a regular expression.
        target: Its path under the data root, with the expression's groups.
        archive: What the archive's name begins with, a regular expression: where members' names
            alone don't tell.
        if_asked: Unpack it only if a benchmark asks about it: an image of a large archive.
    """

    member: str
    target: str
    archive: str = ""
    if_asked: bool = False

    def place(self, archive: str, member: str) -> str | None:
        """Return the path of a member under the data root; None if the rule isn't about it."""
        found = re.search(f"(?:^|/){self.member}$", member)
        return found.expand(self.target) if found and re.match(self.archive, archive) else None


#: Of MME, ScienceQA and IconQA all files are asked about; the order of rules doesn't matter.
RULES = (
    Rule(
        rf"({_SUBTASKS})/((?:images/|questions_answers_YN/)?[^/]+\.(?:txt|jpg|jpeg|png))",
        r"MME/\1/\2",
        archive="MME",
    ),
    Rule(r"(mmbench_dev_(?:20230712|cn_20231003)\.tsv)", r"MMBench/\1"),
    Rule(r"(testdev_balanced_questions\.json)", r"GQA/\1"),
    Rule(r"images/(n?\d+\.jpg)", r"GQA/images/\1", archive="(?:allI|i)mages", if_asked=True),
    Rule(r"scienceqa/((?:problems|pid_splits)\.json)", r"ScienceQA/\1"),
    Rule(r"(\d+/image\.png)", r"ScienceQA/images/test/\1", archive=r"test\."),
    Rule(r"(TextVQA_0\.5\.1_val\.json)", r"TextVQA/\1"),
    Rule(r"(llava_textvqa_val_v051_ocr\.jsonl)", r"TextVQA/\1"),
    Rule(r"train_images/([0-9a-f]+\.jpg)", r"TextVQA/train_images/\1", if_asked=True),
    Rule(r"(test_[23]d\.parquet)", r"CV-Bench/\1"),
    Rule(r"(dataset_flickr30k\.json)", r"Flickr30k/\1"),
    Rule(r"flickr30k[-_]images/(\d+\.jpg)", r"Flickr30k/flickr30k-images/\1", if_asked=True),
    Rule(r"(dataset_coco\.json)", r"COCO/\1"),
    Rule(r"(val2014/COCO_val2014_\d+\.jpg)", r"COCO/\1", if_asked=True),
    Rule(r"(test/choose_txt/\d+/(?:data\.json|image\.png))", r"IconQA/\1"),
    Rule(r"(OpenEnded_mscoco_val2014_questions\.json)", r"OKVQA/\1"),
    Rule(r"(mscoco_val2014_annotations\.json)", r"OKVQA/\1"),
)


@dataclass
class Unpacked:
    """What was done with an archive.

    Attributes:
        archive: Its name.
        written: Files that were written, by benchmark's folder.
        present: Files that were there already, with the same size.
        unasked: Images that no benchmark asks about.
        error: Why the rest of it can't be unpacked.
    """

    archive: str
    written: Counter[str] = field(default_factory=Counter)
    present: Counter[str] = field(default_factory=Counter)
    unasked: Counter[str] = field(default_factory=Counter)
    error: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether there is a file of a benchmark in it."""
        return bool(self.written or self.present or self.unasked)

    def __str__(self) -> str:
        if not self.is_known and self.error is None:
            return f"{self.archive}: nothing in it that a benchmark needs"
        kinds = (
            (self.written, "written"),
            (self.present, "there already"),
            (self.unasked, "not asked about"),
        )
        parts = [f"{n} {what} ({name})" for counts, what in kinds for name, n in counts.items()]
        parts += [] if self.error is None else [f"can't be unpacked: {self.error}"]
        return f"{self.archive}: {', '.join(parts)}"


def unpack(
    archives: Sequence[Path], data_root: Path, asked: Callable[[], Collection[Path]]
) -> Iterator[Unpacked]:
    """Put the benchmarks' files of archives to where benchmarks look for them.

    Files with questions come first, from all archives, then images. A file that is there with the
    same size is kept; others are written under another name first, so that a process that is
    stopped leaves no half one behind. An archive that is missing, damaged or encrypted doesn't keep
    the others from being unpacked: what is yielded for it holds the error.

    Args:
        archives: zip and tar files, or single files that a benchmark reads; folders are left out.
        data_root: The folder that holds the benchmarks' folders.
        asked: Returns the images that benchmarks ask about, once their questions are there.

    Yields:
        What was done with each archive, once for its questions and once for its images.
    """
    plain = [rule for rule in RULES if not rule.if_asked]
    yield from (_unpack(archive, data_root, plain, None) for archive in archives)
    images = [rule for rule in RULES if rule.if_asked]
    wanted = {path.resolve() for path in asked()}
    yield from (_unpack(archive, data_root, images, wanted) for archive in archives)


def asked_images(benchmarks: Iterable[Benchmark]) -> set[Path]:
    """Return the files of images of those benchmarks whose questions can be read."""
    found: set[Path] = set()
    for benchmark in benchmarks:
        if type(benchmark).open_image is not Benchmark.open_image:
            continue  # then names aren't paths
        try:
            items = benchmark.items()
        except (ValueError, ImportError):
            continue
        found.update(Path(name) for item in items for name in item.images)
    return found


def broken_images(benchmark: Benchmark) -> dict[str, str]:
    """Open every image of a benchmark; return those that can't be opened, with the reason."""
    broken = {}
    for name in dict.fromkeys(name for item in benchmark.items() for name in item.images):
        try:
            benchmark.open_image(name)
        except ValueError as error:
            broken[name] = str(error)
    return broken


def _unpack(
    archive: Path, data_root: Path, rules: Sequence[Rule], wanted: Collection[Path] | None
) -> Unpacked:
    done = Unpacked(archive.name)
    try:
        for member, size, opened in _members(archive):
            places = (rule.place(archive.name, member) for rule in rules)
            place = next((one for one in places if one is not None), None)
            if place is None:
                continue
            target, folder = data_root / place, place.partition("/")[0]
            if wanted is not None and target.resolve() not in wanted:
                done.unasked[folder] += 1
            elif target.is_file() and target.stat().st_size == size:
                done.present[folder] += 1
            else:
                _write(opened, target)
                done.written[folder] += 1
    except _UNREADABLE as error:
        done.error = str(error) or type(error).__name__
    return done


#: RuntimeError: it is encrypted, or (NotImplementedError) compressed in an unknown way.
_UNREADABLE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError),
    *(EOFError, OSError, RuntimeError),
)


def _members(archive: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes] | None]]]:
    """Yield path, size and opener of each file; a file that is no archive is one itself."""
    if archive.is_dir():
        return
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                if not info.is_dir() and _is_meant(info.filename):
                    yield info.filename, info.file_size, partial(opened.open, info)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and _is_meant(member.name):
                    yield member.name, member.size, partial(tar.extractfile, member)
    else:
        yield archive.name, archive.stat().st_size, lambda: archive.open("rb")


def _is_meant(name: str) -> bool:
    """Tell whether a file isn't one that macOS leaves in archives."""
    return "__MACOSX/" not in name and not name.rpartition("/")[2].startswith("._")


def _write(opened: Callable[[], IO[bytes] | None], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _partial(target) as part, part.open("wb") as file:
        source = opened()
        assert source is not None  # directories and links were left out
        with source:
            shutil.copyfileobj(source, file)


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    part = target.with_name(f".{target.name}.partial")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
