"""Trained runs as folders that other code loads: transformers, LLaVA, InternVL, public CoVFT."""

from covft.checkpoints.export.run import FORMATS, export_run

__all__ = ["FORMATS", "export_run"]
