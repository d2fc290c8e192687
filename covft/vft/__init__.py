"""Visual fine-tuning methods."""

from covft.vft.base import VFTMethod
from covft.vft.covft import CoVFT
from covft.vft.inference import collect_gates, inference_routing
from covft.vft.lora import LoRA
from covft.vft.plain import BitFit, Freeze, Full
from covft.vft.q_moe import QMoE
from covft.vft.qa_vit import QAViT
from covft.vft.svpt import SVPT
from covft.vft.vpt import VPT

__all__ = [
    "SVPT",
    "VPT",
    "BitFit",
    "CoVFT",
    "Freeze",
    "Full",
    "LoRA",
    "QAViT",
    "QMoE",
    "VFTMethod",
    "collect_gates",
    "inference_routing",
]
