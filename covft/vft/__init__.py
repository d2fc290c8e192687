"""Visual fine-tuning methods."""

from covft.vft.base import VFTMethod
from covft.vft.covft import CoVFT
from covft.vft.plain import BitFit, Freeze, Full

__all__ = ["BitFit", "CoVFT", "Freeze", "Full", "VFTMethod"]
