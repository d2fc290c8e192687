"""covft: context-aware visual fine-tuning of multimodal LLMs, and the benchmark around it."""

import logging

__version__ = "0.1.0"

# mmengine imports DeepSpeed wherever it is installed, and DeepSpeed then tells standard output,
# where tools print tables and JSON, that there is no GPU.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in record.getMessage()
)
