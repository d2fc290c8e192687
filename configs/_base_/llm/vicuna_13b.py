"""Vicuna-13B-1.5, the larger LLM of LLaVA-1.5."""

from covft.models import Vicuna

llm = dict(type=Vicuna, arch="13b", weights="pretrained")
