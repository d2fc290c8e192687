"""What a dataset must know about the model that it feeds."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from covft.conversation import Template, get_template
from covft.models.mllm import MLLM
from covft.models.vision.image_spec import ImageSpec


@dataclass(frozen=True)
class InputSpec:
    """The model's side of the data; derived from the model, so that nothing gets stale.

    Attributes:
        tokenizer: The LLM's.
        template: How conversations are written for the LLM.
        image: The vision encoder's pixels.
        num_image_tokens: Tokens that an image takes in the LLM's input.
        context_tokenizer: The text encoder's; None where the method needs no context.
        max_context_length: Longer context texts are truncated to this many tokens.

    Raises:
        ValueError: If the template's end of an answer is no single token of the tokenizer, or a
            number isn't positive.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    image: ImageSpec
    num_image_tokens: int
    context_tokenizer: PreTrainedTokenizerBase | None = None
    max_context_length: int = 512

    def __post_init__(self) -> None:
        for name in ("num_image_tokens", "max_context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        self.template.stop_token_ids(self.tokenizer)

    @classmethod
    def of(cls, model: MLLM) -> InputSpec:
        """Return what a model expects of its data.

        Raises:
            ValueError: If the model has no tokenizer, or the template doesn't go with it.
        """
        if model.llm.tokenizer is None:
            raise ValueError("the LLM has no tokenizer; set model.llm.tokenizer (folder or hub id)")
        text_encoder = model.text_encoder
        return cls(
            tokenizer=model.llm.tokenizer,
            template=get_template(model.template),
            image=model.vision.backbone.image_spec,
            num_image_tokens=model.num_image_tokens,
            context_tokenizer=text_encoder.tokenizer if text_encoder else None,
            max_context_length=text_encoder.max_length if text_encoder else 512,
        )
