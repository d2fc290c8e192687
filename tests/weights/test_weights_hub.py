"""Downloads from the hub, with ``snapshot_download`` played by a fake; no network."""

import fnmatch
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from covft.weights import SourceUnreachableError, resolve_tokenizer, source_of
from covft.weights.hub import fetch_from_hub, find_in_hub_cache, hub_source

REVISION = "0123abcd"
TEXTS = {"config.json": "{}", "tokenizer.json": "{}", "README.md": "", "modeling.py": "raise"}


class FakeHub:
    """Repositories, and a cache of what was downloaded of them."""

    def __init__(self, cache: Path):
        self.cache = cache
        self.repositories: dict[str, dict[str, str]] = {}
        self.failure: Exception | None = None
        self.downloads = 0

    def snapshot_download(
        self, name, *, local_files_only=False, allow_patterns=("*",), ignore_patterns=()
    ):
        folder = self.cache / f"models--{name.replace('/', '--')}" / "snapshots" / REVISION
        if local_files_only:
            if not folder.is_dir():
                raise errors.LocalEntryNotFoundError("nothing cached")
            return str(folder)
        self.downloads += 1
        if self.failure is not None:
            raise self.failure
        for path, text in self.repositories[name].items():
            if not any(fnmatch.fnmatch(path, pattern) for pattern in allow_patterns):
                continue
            if any(fnmatch.fnmatch(path, pattern) for pattern in ignore_patterns):
                continue
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hf")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_safetensors_config_and_tokenizer_only(hub):
    hub.repositories["org/name"] = {
        **TEXTS,
        "tokenizer.model": "",
        "model.safetensors": "",
        "pytorch_model.bin": "",
        "onnx/model.safetensors": "",
        "consolidated.safetensors": "",
        "tf_model.h5": "",
    }
    folder = fetch_from_hub("org/name")
    assert names(folder) == {
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "model.safetensors",
    }
    assert source_of(folder) == "hub: org/name@0123abcd"


def test_a_complete_download_is_not_asked_for_again(hub):
    hub.repositories["org/name"] = {**TEXTS, "model.safetensors": ""}
    assert find_in_hub_cache("org/name") is None
    folder = fetch_from_hub("org/name")
    assert fetch_from_hub("org/name") == find_in_hub_cache("org/name") == folder
    assert hub.downloads == 1


def test_pytorch_files_where_there_is_nothing_else(hub):
    index = json.dumps({"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}})
    hub.repositories["org/old"] = {
        **TEXTS,
        "pytorch_model.bin.index.json": index,
        "pytorch_model-1.bin": "",
        "pytorch_model-2.bin": "",
        "optimizer.bin": "",
    }
    folder = fetch_from_hub("org/old")
    assert {"pytorch_model-1.bin", "pytorch_model-2.bin"} <= names(folder)
    assert "optimizer.bin" not in names(folder)


def test_a_broken_off_download_is_taken_up_again(hub):
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    repository = {**TEXTS, "model.safetensors.index.json": index, "model-1.safetensors": ""}
    hub.repositories["org/big"] = repository
    with pytest.raises(ValueError, match=r"no model-2\.safetensors, which its index names"):
        fetch_from_hub("org/big")
    assert find_in_hub_cache("org/big") is None
    repository["model-2.safetensors"] = ""
    assert "model-2.safetensors" in names(fetch_from_hub("org/big"))


@pytest.mark.parametrize(
    ("files", "lacking"),
    [(TEXTS, "weights"), ({"model.safetensors": ""}, r"config\.json")],
)
def test_a_repository_without_a_model(hub, files, lacking):
    hub.repositories["org/none"] = files
    with pytest.raises(ValueError, match=f"has no {lacking}"):
        fetch_from_hub("org/none")


def response_error(kind):
    # The response's class is the HTTP client's, which differs between huggingface_hub's releases.
    return kind("no", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("failure", "expected", "message"),
    [
        (errors.LocalEntryNotFoundError("no connection\nlong"), SourceUnreachableError, "^no conn"),
        (errors.OfflineModeIsEnabled("offline"), SourceUnreachableError, "offline"),
        (response_error(errors.HfHubHTTPError), SourceUnreachableError, "no"),
        (errors.HTTPError("read timed out"), SourceUnreachableError, "read timed out"),
        (response_error(errors.GatedRepoError), PermissionError, "accept its licence"),
        (
            response_error(errors.RepositoryNotFoundError),
            ValueError,
            "neither a folder nor a repository",
        ),
    ],
)
def test_failures_are_told_apart(hub, failure, expected, message):
    hub.failure = failure
    with pytest.raises(expected, match=message):
        fetch_from_hub("org/name")


def test_a_full_disk_is_not_taken_for_a_missing_connection(hub):
    hub.failure = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left") as caught:
        fetch_from_hub("org/name")
    assert not isinstance(caught.value, SourceUnreachableError)


def test_hub_source_reads_hub_caches_only(tmp_path):
    assert hub_source(tmp_path / "models--a--b--c" / "snapshots" / "f00") == "hub: a/b--c@f00"
    assert hub_source(tmp_path / "models" / "a--b") is None


def test_a_tokenizer_alone_leaves_the_weights_on_the_hub(hub, tmp_path):
    hub.repositories["org/large"] = {**TEXTS, "model.safetensors": "8 GB"}
    folder = resolve_tokenizer("org/large", cache_dir=tmp_path / "covft")
    assert names(folder) == {"config.json", "tokenizer.json"}
    assert resolve_tokenizer("org/large", cache_dir=tmp_path / "covft") == folder
    assert hub.downloads == 1
    # The weights are still fetched where they are asked for.
    assert "model.safetensors" in names(fetch_from_hub("org/large"))
    assert resolve_tokenizer(tmp_path) == tmp_path
