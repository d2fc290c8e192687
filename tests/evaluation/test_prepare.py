import runpy
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from evaluation.official_files import image_bytes, write_icon_qa, write_image, write_science_qa
from evaluation.official_files_open import (
    write_coco_captions,
    write_flickr30k,
    write_gqa,
    write_mme,
    write_ok_vqa,
    write_text_vqa,
)

from covft.evaluation import prepare
from covft.evaluation.benchmarks.captions import COCOCaptions, Flickr30k
from covft.evaluation.benchmarks.gqa import GQA
from covft.evaluation.benchmarks.icon_qa import IconQA
from covft.evaluation.benchmarks.mme import MME
from covft.evaluation.benchmarks.ok_vqa import OKVQA
from covft.evaluation.benchmarks.science_qa import ScienceQA
from covft.evaluation.benchmarks.text_vqa import TextVQA
from covft.evaluation.check_data import check_data
from covft.evaluation.prepare import asked_images, broken_images, unpack

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"
PATHS = (MME, GQA, ScienceQA, TextVQA, IconQA, Flickr30k, COCOCaptions, OKVQA)


def zipped(path: Path, folder: Path, members: Sequence[str], inside: str = "") -> Path:
    """Pack what a folder holds under some paths."""
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            found = folder / member
            for file in sorted(found.rglob("*")) if found.is_dir() else [found]:
                if file.is_file():
                    archive.write(file, inside + str(file.relative_to(folder)))
    return path


@pytest.fixture
def downloads(tmp_path: Path) -> list[Path]:
    """The official archives, as they are called and laid out."""
    made, to = tmp_path / "made", tmp_path / "downloads"
    to.mkdir()
    write_mme(made / "mme", inside="MME_Benchmark", cognition=True)
    (made / "mme" / "MME_Benchmark_release_version" / "eval_tool").mkdir()
    write_image(made / "mme" / "__MACOSX" / "OCR" / "._007.jpg", 0)
    write_gqa(made / "gqa")
    write_image(made / "gqa" / "images" / "12345.jpg", 9)
    write_science_qa(made / "sqa")
    write_text_vqa(made / "text")
    write_image(made / "text" / "train_images" / "ffff.jpg", 9)
    write_icon_qa(made / "icon")
    write_flickr30k(made / "flickr")
    write_coco_captions(made / "coco")
    write_ok_vqa(made / "ok")
    (made / "ok" / "val2014").rename(made / "ok" / "more")
    for image in (made / "ok" / "more").iterdir():
        image.rename(made / "coco" / "val2014" / image.name)
    captions = to / "caption_datasets.zip"
    with zipfile.ZipFile(captions, "w") as archive:
        archive.write(made / "coco" / "dataset_coco.json", "dataset_coco.json")
        archive.write(made / "flickr" / "dataset_flickr30k.json", "dataset_flickr30k.json")
    with tarfile.open(to / "flickr30k-images.tar.gz", "w:gz") as tar:
        tar.add(made / "flickr" / "flickr30k-images", "flickr30k-images")
    ocr = ["llava_textvqa_val_v051_ocr.jsonl"]
    vqa = ["OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"]
    return [
        to / "flickr30k-images.tar.gz",
        zipped(to / "images.zip", made / "gqa", ["images"]),
        zipped(to / "val2014.zip", made / "coco", ["val2014"]),
        zipped(to / "train_val_images.zip", made / "text", ["train_images"]),
        zipped(to / "MME_Benchmark_release_version.zip", made / "mme", ["."]),
        zipped(to / "questions1.2.zip", made / "gqa", ["testdev_balanced_questions.json"]),
        zipped(to / "test.zip", made / "sqa" / "images", ["test"]),
        zipped(
            to / "ScienceQA-main.zip",
            made / "sqa",
            ["problems.json", "pid_splits.json"],
            inside="ScienceQA-main/data/scienceqa/",
        ),
        zipped(to / "eval.zip", made / "text", ocr, inside="eval/textvqa/"),
        made / "text" / "TextVQA_0.5.1_val.json",
        zipped(to / "iconqa_data.zip", made / "icon", ["test"], inside="iconqa_data/iconqa/"),
        captions,
        *(zipped(to / f"{name}.zip", made / "ok", [name]) for name in vqa),
    ]


def benchmarks(root: Path) -> list:
    return [kind(root=str(root / kind.folder)) for kind in PATHS]


def test_downloads_become_what_benchmarks_read(downloads: list[Path], tmp_path: Path) -> None:
    root = tmp_path / "data"
    done = list(unpack(downloads, root, lambda: asked_images(benchmarks(root))))
    for benchmark in benchmarks(root):
        report = check_data(benchmark)
        assert report.error is None and not report.missing and not report.problems, report
        assert report.num_items > 0
    by_name = {one.archive: one for one in done[len(downloads) :]}
    assert by_name["images.zip"].written == {"GQA": 3}
    assert by_name["images.zip"].unasked == {"GQA": 1}
    assert by_name["val2014.zip"].written == {"COCO": 6}
    assert by_name["val2014.zip"].unasked == {"COCO": 1}
    assert str(by_name["images.zip"]) == "images.zip: 3 written (GQA), 1 not asked about (GQA)"
    assert str(done[0]) == "flickr30k-images.tar.gz: nothing in it that a benchmark needs"
    assert not list(root.rglob("._*")) and not list(root.rglob("*.partial"))
    again = list(unpack(downloads, root, lambda: asked_images(benchmarks(root))))
    assert not any(one.written for one in again)
    assert sum(one.present.total() for one in again) == sum(one.written.total() for one in done)


def test_a_stopped_unpacking_leaves_no_half_file(
    downloads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(source, file) -> None:
        file.write(source.read(10))
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare.shutil, "copyfileobj", stop)
    with pytest.raises(KeyboardInterrupt):
        list(unpack(downloads[4:5], tmp_path / "data", set))
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_damaged_and_missing_archives_are_named(downloads: list[Path], tmp_path: Path) -> None:
    content = downloads[0].read_bytes()
    downloads[0].write_bytes(content[: len(content) // 2])
    archives = [downloads[0], tmp_path / "absent.zip", _locked(tmp_path / "l.zip"), downloads[5]]
    done = list(unpack(archives, tmp_path / "data", set))[:4]
    assert str(done[0]).startswith("flickr30k-images.tar.gz: can't be unpacked: ")
    assert str(done[1]).startswith("absent.zip: can't be unpacked: ")
    assert "is encrypted" in str(done[2])
    assert str(done[3]) == "questions1.2.zip: 1 written (GQA)"  # the others are


def _locked(path: Path) -> Path:
    """Write a zip file whose only member says that it is encrypted."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("testdev_balanced_questions.json", "{}")
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["../../x/OCR/evil.txt", "OCR/../../evil.txt", "/OCR/evil.txt"])
def test_nothing_is_written_elsewhere(name: str, tmp_path: Path) -> None:
    archive = tmp_path / "MME.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(name, "x")
    list(unpack([archive], tmp_path / "data", set))
    found = list(tmp_path.rglob("*.txt"))
    assert all(path == tmp_path / "data" / "MME" / "OCR" / "evil.txt" for path in found)


def test_broken_images_are_found_by_opening_them(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    images = sorted((tmp_path / "images").iterdir())
    images[0].write_bytes(image_bytes(0, "JPEG")[:100])
    images[1].unlink()
    broken = broken_images(GQA(root=str(tmp_path)))
    assert set(broken) == {str(images[0]), str(images[1])}
    assert broken[str(images[1])] == f"image not found: {images[1]}"


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert isinstance(stopped.value.code, int), stopped.value
    return stopped.value.code


def test_the_tool_converts_and_checks(
    downloads: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    root = tmp_path / "data"
    other = tmp_path / "holiday.jpg"
    (tmp_path / "folder").mkdir()
    write_image(other, 1)
    assert (
        run_tool(
            monkeypatch, "convert", *downloads, other, tmp_path / "folder", "--data-root", root
        )
        == 0
    )
    said = capsys.readouterr().out
    assert f"{other}: nothing in it that a benchmark needs" in said
    assert "questions1.2.zip: 1 written (GQA)" in said
    assert run_tool(monkeypatch, "convert", other, "--data-root", root) == 1
    torn = tmp_path / "torn.tar.gz"
    torn.write_bytes(downloads[0].read_bytes()[:200])
    capsys.readouterr()
    assert run_tool(monkeypatch, "convert", torn, downloads[5], "--data-root", root) == 1
    said = capsys.readouterr().out
    assert said.count("torn.tar.gz") == 1 and "can't be unpacked" in said
    assert "questions1.2.zip: 1 there already (GQA)" in said
    capsys.readouterr()
    arguments = ("check", "gqa", "mmvp", "--open-images", "--data-root", root)
    assert run_tool(monkeypatch, *arguments) == 1
    said = capsys.readouterr().out
    assert "MISSING gqa: 3 of 12578 items, NOT the official number" in said
    assert "MISSING mmvp: " in said and "Questions.csv not found" in said
    monkeypatch.setattr(GQA, "num_official", 3)
    assert run_tool(monkeypatch, "check", "gqa", "--data-root", root) == 0
    assert capsys.readouterr().out == "ok      gqa: 3 of 3 items\n"
    image = next((root / "GQA" / "images").iterdir())
    image.write_bytes(b"")
    assert run_tool(monkeypatch, "check", "gqa", "--open-images", "--data-root", root) == 1
    assert f"image can't be read: {image}" in capsys.readouterr().out


def test_a_data_set_of_the_package_index_needs_no_folder(
    easy_vqa_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(
        "covft.evaluation.benchmarks.easy_vqa.dataset_root", lambda _: easy_vqa_root
    )
    monkeypatch.setattr("covft.evaluation.benchmarks.easy_vqa.EasyVQA.num_official", 24)
    assert run_tool(monkeypatch, "check", "easy_vqa", "--data-root", tmp_path) == 0
    assert capsys.readouterr().out == "ok      easy_vqa: 24 of 24 items\n"
    (easy_vqa_root / "test" / "questions.json").unlink()
    assert run_tool(monkeypatch, "check", "easy_vqa", "--data-root", tmp_path) == 1
    assert capsys.readouterr().out.startswith("MISSING easy_vqa: easy-VQA: ")
