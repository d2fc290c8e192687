"""Files of trained weights, loading the run that wrote them, and public checkpoints."""

from covft.checkpoints.importing import Imported, import_checkpoint
from covft.checkpoints.run import Run, build_model, load_run

__all__ = ["Imported", "Run", "build_model", "import_checkpoint", "load_run"]
