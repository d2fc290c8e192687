"""covft: context-aware visual fine-tuning of multimodal LLMs, and the benchmark around it."""

__version__ = "0.1.0"
