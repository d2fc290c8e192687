"""SmolLM2-135M-Instruct, small enough to be tuned on a CPU."""

from covft.models import CausalLM

llm = dict(type=CausalLM, weights="HuggingFaceTB/SmolLM2-135M-Instruct")
