"""Data: instruction conversations, images, batches, and the order in which steps see them."""

from covft.datasets.base import ConversationDataset, Sizes
from covft.datasets.collate import Collator
from covft.datasets.easy_vqa import EasyVQADataset
from covft.datasets.instruct import InstructDataset
from covft.datasets.internvl import InternVLDataset
from covft.datasets.mixture import MixtureDataset
from covft.datasets.packing import CostModel
from covft.datasets.sample import BadSample, Sample
from covft.datasets.sampler import StepBatchSampler
from covft.datasets.spec import InputSpec
from covft.datasets.tiling import Tiles, tiled
from covft.datasets.transforms import transform

__all__ = [
    "BadSample",
    "Collator",
    "ConversationDataset",
    "CostModel",
    "EasyVQADataset",
    "InputSpec",
    "InstructDataset",
    "InternVLDataset",
    "MixtureDataset",
    "Sample",
    "Sizes",
    "StepBatchSampler",
    "Tiles",
    "tiled",
    "transform",
]
