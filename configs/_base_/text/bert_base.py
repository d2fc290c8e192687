"""BERT-base, CoVFT's text encoder; its [CLS] state is the context."""

from covft.models import TextEncoder

text_encoder = dict(type=TextEncoder, weights="google-bert/bert-base-uncased", pooling="cls")
