"""Vicuna-7B-1.5, LLaVA-1.5's LLM."""

from covft.models import Vicuna

llm = dict(type=Vicuna, arch="7b", weights="pretrained")
