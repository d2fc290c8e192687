"""The projector alone, as LLaVA's first stage writes it: ``mm_projector.bin``."""

from __future__ import annotations

from covft.checkpoints.layouts.base import Layout
from covft.checkpoints.layouts.llava import LLAVA_PROJECTORS

MM_PROJECTOR = Layout(
    name="mm_projector",
    holds="LLaVA's first stage (mm_projector.bin)",
    prefixes={"projector.": ("model.mm_projector.", "mm_projector.")},
    projectors=LLAVA_PROJECTORS,
    marks=(r"(model\.)?mm_projector\.",),
)
