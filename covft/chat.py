"""A conversation with a trained model about images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from covft.conversation import IMAGE_TOKEN, context_text
from covft.datasets.prompts import Prompt, generate_answers
from covft.datasets.spec import InputSpec
from covft.datasets.transforms import load_image
from covft.models.mllm import MLLM
from covft.models.vision.feature_cache import FeatureCache


class ChatSession:
    """Asks a model one question after another about the same images.

    The context of context-aware methods is the first question, for the whole session: another
    context changes the visual tokens and so what the earlier answers were about. What the encoder
    computes without the context is kept for the session's further questions.

    Args:
        model: The model, in eval mode.
        spec: What it expects of its data.
        images: Image files or images; the first question is about all of them.
        resize: ``crop``, ``stretch`` or ``pad`` instead of the encoder's own way.

    Attributes:
        turns: The conversation so far.
    """

    def __init__(
        self,
        model: MLLM,
        spec: InputSpec,
        images: Sequence[str | Path | Image.Image] = (),
        *,
        resize: str | None = None,
    ) -> None:
        self.model, self.spec, self.resize = model, spec, resize
        self.images = [i if isinstance(i, Image.Image) else load_image(i) for i in images]
        self.turns: list[dict[str, str]] = []
        self._feature_cache = FeatureCache()

    def ask(self, question: str, *, max_new_tokens: int = 128) -> str:
        """Return the model's answer, and remember both for the next question.

        Args:
            question: The question's text; tags of the images are put in front of the first.
            max_new_tokens: Longest answer in tokens.

        Raises:
            ValueError: If the question is empty, or holds an image tag of its own.
        """
        if not question.strip() or IMAGE_TOKEN in question:
            raise ValueError(f"the question is empty or holds a literal {IMAGE_TOKEN}")
        tags = "" if self.turns else "<image>\n" * len(self.images)
        turns = [*self.turns, {"from": "human", "value": tags + question}]
        prompt = Prompt("chat", turns, self.images, context_text(turns[:1]))
        (answer,) = generate_answers(
            self.model,
            [prompt],
            self.spec,
            max_new_tokens=max_new_tokens,
            resize=self.resize,
            feature_cache=self._feature_cache,
        )
        self.turns = [*turns, {"from": "gpt", "value": answer}]
        return answer
