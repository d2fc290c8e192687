"""Conversations as an LLM reads them: templates, tokenising with labels, context text."""

from covft.conversation.encode import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    Encoded,
    Span,
    decoded_spans,
    encode,
    encode_prompt,
)
from covft.conversation.templates import IMAGE_TOKEN, Template, get_template
from covft.conversation.turns import Turn, checked_turns, context_text, placed_images

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN",
    "IMAGE_TOKEN_ID",
    "Encoded",
    "Span",
    "Template",
    "Turn",
    "checked_turns",
    "context_text",
    "decoded_spans",
    "encode",
    "encode_prompt",
    "get_template",
    "placed_images",
]
