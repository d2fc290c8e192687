"""MiniLM-L6, a six-layer sentence encoder; its training pools by the mean."""

from covft.models import TextEncoder

text_encoder = dict(
    type=TextEncoder, weights="sentence-transformers/all-MiniLM-L6-v2", pooling="mean"
)
