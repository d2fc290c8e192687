"""The MLLM and its parts."""

from covft.models.llm import CausalLM, Phi3, Vicuna
from covft.models.mllm import MLLM, LossOutput
from covft.models.projectors import LinearProjector, MLPProjector, PixelShuffleProjector
from covft.models.text_encoder import Context, LLMEmbeddings, TextEncoder
from covft.models.vision import CLIP, DINOv2, DINOv3, InternViT, SigLIP
from covft.models.vision.tower import VisionTower

__all__ = [
    "CLIP",
    "MLLM",
    "CausalLM",
    "Context",
    "DINOv2",
    "DINOv3",
    "InternViT",
    "LLMEmbeddings",
    "LinearProjector",
    "LossOutput",
    "MLPProjector",
    "Phi3",
    "PixelShuffleProjector",
    "SigLIP",
    "TextEncoder",
    "Vicuna",
    "VisionTower",
]
