"""How many floating-point operations a model's training and inference ask for."""

from covft.engine.flops.cost import cost_model
from covft.engine.flops.model import FlopModel, Work
from covft.engine.flops.peak import peak_tflops
from covft.engine.flops.tally import Flops, Stream, Tally, count, counts

__all__ = [
    "FlopModel",
    "Flops",
    "Stream",
    "Tally",
    "Work",
    "cost_model",
    "count",
    "counts",
    "peak_tflops",
]
