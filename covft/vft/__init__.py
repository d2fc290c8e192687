"""Visual fine-tuning methods."""

from covft.vft.base import VFTMethod
from covft.vft.covft import CoVFT
from covft.vft.plain import Freeze, Full

__all__ = ["CoVFT", "Freeze", "Full", "VFTMethod"]
