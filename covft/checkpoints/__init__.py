"""Files of trained weights, and loading the run that wrote them."""

from covft.checkpoints.run import Run, build_model, load_run

__all__ = ["Run", "build_model", "load_run"]
