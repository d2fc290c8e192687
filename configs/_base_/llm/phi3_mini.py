"""Phi-3-mini-128k, the LLM of InternVL2-4B.

The tokenizer is InternVL2-4B's: Phi-3's own with the marks around images, ``<img>`` and ``</img>``,
added in rows that Phi-3's embeddings have to spare.
"""

from covft.models import Phi3

llm = dict(type=Phi3, arch="mini-128k", weights="pretrained", tokenizer="OpenGVLab/InternVL2-4B")
