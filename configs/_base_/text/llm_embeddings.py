"""The LLM's own token embeddings, averaged, as context: no second text encoder."""

from covft.models import LLMEmbeddings

text_encoder = dict(type=LLMEmbeddings, pooling="mean")
