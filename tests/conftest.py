"""A miniature of the quickstart: six images, small tokenizers, and options that shrink it."""

import gc
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from quickstart_miniature import tiny_quickstart, write_easy_vqa
from tokenizers_for_tests import bert_tokenizer, byte_level_tokenizer


@pytest.fixture(scope="session", autouse=True)
def module_cache(tmp_path_factory):
    """Keep the code of exported models out of the user's cache.

    For the whole session: once imported, Python looks for it in the first cache alone.
    """
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        yield


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    byte_level_tokenizer().save_pretrained(root / "llm")
    bert_tokenizer().save_pretrained(root / "text")
    return root


@pytest.fixture
def easy_vqa_root(tmp_path):
    return write_easy_vqa(tmp_path / "easy_vqa")


@pytest.fixture
def tiny_options(tokenizer_folders, easy_vqa_root):
    return tiny_quickstart(tokenizer_folders, easy_vqa_root)


def pytest_collection_finish():
    """Keep the garbage collector from what was imported: looking through it takes 0.3 s."""
    gc.collect()
    gc.freeze()
