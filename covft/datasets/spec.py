"""What a dataset must know about the model that it feeds."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from covft.conversation import Template, get_template
from covft.models.llm import CausalLM
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
        context_suffix: Put after each context text that doesn't end in it, in training only.

    Raises:
        ValueError: If the template's end of an answer is no single token of the tokenizer, its
            markup isn't in it, or a number isn't positive.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    image: ImageSpec
    num_image_tokens: int
    context_tokenizer: PreTrainedTokenizerBase | None = None
    max_context_length: int = 512
    context_suffix: str = ""

    def __post_init__(self) -> None:
        for name in ("num_image_tokens", "max_context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        self.template.stop_token_ids(self.tokenizer)
        self.template.check_added_tokens(self.tokenizer)

    @classmethod
    def of(cls, model: MLLM) -> InputSpec:
        """Return what a model expects of its data.

        Raises:
            ValueError: If the model has no tokenizer, or template or LLM don't go with it.
        """
        if model.llm.tokenizer is None:
            raise ValueError("the LLM has no tokenizer; set model.llm.tokenizer (folder or hub id)")
        _check_vocabulary(model.llm)
        text_encoder = model.text_encoder
        return cls(
            tokenizer=model.llm.tokenizer,
            template=get_template(model.template),
            image=model.vision.backbone.image_spec,
            num_image_tokens=model.num_image_tokens,
            context_tokenizer=text_encoder.tokenizer if text_encoder else None,
            max_context_length=text_encoder.max_length if text_encoder else 512,
            context_suffix=text_encoder.training_suffix if text_encoder else "",
        )


def _check_vocabulary(llm: CausalLM) -> None:
    """Refuse a tokenizer with more tokens than the LLM has embeddings: their lookup would fail."""
    size = len(llm.tokenizer or ())
    rows = llm.model.get_input_embeddings().weight.shape[0]
    if size > rows:
        raise ValueError(
            f"the tokenizer has {size} tokens, but the LLM has embeddings for {rows}; set "
            "model.llm.tokenizer to the LLM's own, or to one that was extended for it"
        )
