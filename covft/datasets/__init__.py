"""Data: instruction conversations, images, batches, and the order in which steps see them."""

from covft.datasets.annotations import read_annotations
from covft.datasets.collate import Collator
from covft.datasets.easy_vqa import EasyVQADataset
from covft.datasets.instruct import InstructDataset
from covft.datasets.internvl import InternVLDataset
from covft.datasets.sample import BadSample, Sample
from covft.datasets.sampler import StepBatchSampler
from covft.datasets.spec import InputSpec
from covft.datasets.tiling import Tiles, tiled
from covft.datasets.transforms import load_image, transform

__all__ = [
    "BadSample",
    "Collator",
    "EasyVQADataset",
    "InputSpec",
    "InstructDataset",
    "InternVLDataset",
    "Sample",
    "StepBatchSampler",
    "Tiles",
    "load_image",
    "read_annotations",
    "tiled",
    "transform",
]
