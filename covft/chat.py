"""A conversation with a trained model about images."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from covft.checkpoints.run import Run
from covft.conversation import IMAGE_TOKEN, context_text
from covft.datasets.prompts import Prompt, prompt_batch
from covft.datasets.spec import InputSpec
from covft.datasets.streaming import stream_answer
from covft.datasets.tiling import Resizing
from covft.images import load_image
from covft.models.mllm import MLLM
from covft.models.sampling import Sampling
from covft.models.vision.feature_cache import FeatureCache


class ChatSession:
    """Asks a model one question after another about images.

    Under context-aware methods an image's visual tokens depend on a text. ``context`` says which:

    * ``pinned``: the first question that came with images, for the whole session. The visual tokens
      are computed once, and each prompt continues the one before, whose answers were about the same
      tokens; but the encoder doesn't know what later questions ask for.
    * ``refreshed``: each question's own text, as in the evaluation of single questions. Blocks that
      read it run again for every question, over all images. The conversation so far then stands
      behind visual tokens other than those that its answers were about, and no prompt's beginning
      is that of the one before: keys and values kept from it would be invalid.

    Args:
        model: The model, in eval mode, whose weights stay as they are during the session.
        spec: What it expects of its data.
        images: Image files or images; the first question is about all of them.
        resize: How images become squares, a run's ``resize``; None is the encoder's own way.
        context: ``pinned`` or ``refreshed``.
        sampling: How answers are drawn, from the seed on for the whole session; None takes the
            likeliest token each time.

    Attributes:
        turns: The conversation so far.
        images: Its images, those that wait for the next question included.

    Raises:
        ValueError: If an image can't be read, the model is in training mode, ``context`` is unknown
            or ``refreshed`` for a model that reads none.
    """

    def __init__(
        self,
        model: MLLM,
        spec: InputSpec,
        images: Sequence[str | Path | Image.Image] = (),
        *,
        resize: Resizing = None,
        context: Literal["pinned", "refreshed"] = "pinned",
        sampling: Sampling | None = None,
    ) -> None:
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() before chatting")
        if context not in ("pinned", "refreshed"):
            raise ValueError(f"context must be 'pinned' or 'refreshed', got {context!r}")
        if context == "refreshed" and model.text_encoder is None:
            raise ValueError(
                f"context='refreshed' would be ignored: {type(model.vision.vft).__name__} reads no "
                "context; leave it out"
            )
        self.model, self.spec, self.resize = model, spec, resize
        self.context, self.sampling = context, sampling
        self.images: list[Image.Image] = []
        self.reset()
        self.add_images(images)

    @classmethod
    def of(
        cls,
        run: Run,
        images: Sequence[str | Path | Image.Image] = (),
        *,
        context: Literal["pinned", "refreshed"] = "pinned",
        sampling: Sampling | None = None,
    ) -> ChatSession:
        """Return a session with a run's model, which sees images as its training did.

        Args:
            run: The run, loaded.
            images: As for the class; likewise the others.
            context: See the class.
            sampling: See the class.
        """
        return cls(
            run.model, run.spec, images, resize=run.resize, context=context, sampling=sampling
        )

    def reset(self) -> None:
        """Forget the conversation and its images, as if the session had just begun."""
        self.turns: list[dict[str, str]] = []
        self.images = []
        self._num_asked = 0
        self._feature_cache = FeatureCache()
        self._cached_context: str | None = None
        self._drawn: dict[str, Any] = {}
        if self.sampling is not None:
            self._drawn["logits_processor"] = self.sampling.processors(self.model.device)

    def add_images(self, images: Sequence[str | Path | Image.Image]) -> None:
        """Give images that the next question is about, along with all those before.

        Raises:
            ValueError: If one can't be read; none is added then.
        """
        self.images = [*self.images, *_loaded(images)]

    def ask(
        self,
        question: str,
        *,
        images: Sequence[str | Path | Image.Image] = (),
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
    ) -> str:
        """Return the model's answer, and remember both for the next question.

        Args:
            question: The question's text.
            images: Further images that come with it; their tags are put in front.
            max_new_tokens: Longest answer in tokens.
            stop: Texts at which the answer ends, besides the template's end; not part of it.

        Raises:
            ValueError: If the question is empty or holds an image tag of its own, an image can't be
                read, or the conversation leaves no room for an answer.
        """
        return "".join(
            self.stream(question, images=images, max_new_tokens=max_new_tokens, stop=stop)
        )

    def stream(
        self,
        question: str,
        *,
        images: Sequence[str | Path | Image.Image] = (),
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Yield the model's answer in pieces, as it is generated; joined they are :meth:`ask`'s.

        Question and answer are remembered once the answer has been read to its end. One that is
        left or interrupted before is forgotten, and so are its question and ``images``.

        Args:
            question: As :meth:`ask`; likewise the other arguments.
            images: See :meth:`ask`.
            max_new_tokens: See :meth:`ask`.
            stop: See :meth:`ask`.

        Raises:
            ValueError: As :meth:`ask`.
        """
        if not question.strip() or IMAGE_TOKEN in question:
            raise ValueError(f"the question is empty or holds a literal {IMAGE_TOKEN}")
        shown = [*self.images, *_loaded(images)]
        tags = "<image>\n" * (len(shown) - self._num_asked)
        turns = [*self.turns, {"from": "human", "value": tags + question}]
        context = self._context(turns)
        prompt = Prompt("chat", turns, shown, context)
        batch = prompt_batch([prompt], self.spec, device=self.model.device, resize=self.resize)
        self._check_room(batch["input_ids"].shape[1], max_new_tokens)
        pieces = stream_answer(
            self.model,
            batch,
            self.spec,
            max_new_tokens=max_new_tokens,
            stop=stop,
            **self._vision(batch, context),
            **self._drawn,
        )
        return self._remembered(pieces, turns, shown)

    def _remembered(
        self,
        pieces: Generator[str, None, None],
        turns: list[dict[str, str]],
        shown: list[Image.Image],
    ) -> Iterator[str]:
        before, num_given, answer = self.turns, len(self.images), ""
        with closing(pieces):
            for piece in pieces:
                answer += piece
                yield piece
        if self.turns is not before:
            raise ValueError(
                "the session was asked or reset while this answer was being streamed; read an "
                "answer to its end, or close it, before the next question"
            )
        self.turns = [*turns, {"from": "gpt", "value": answer}]
        self.images = [*shown, *self.images[num_given:]]
        self._num_asked = len(shown)

    def _context(self, turns: Sequence[Mapping[str, str]]) -> str:
        if self.context == "refreshed":
            return context_text(turns[-1:])
        return context_text([next((t for t in turns if IMAGE_TOKEN in t["value"]), turns[0])])

    def _vision(self, batch: Mapping[str, Any], context: str) -> dict[str, Any]:
        """Return what spares ``generate`` encoding again: visual tokens, or the blocks before."""
        if self.context == "refreshed":
            return {"feature_cache": self._feature_cache}

        # By their pixels: under tiling a further image can change how those before are cut.
        def encode(pixels: Tensor) -> Tensor:
            rows = torch.zeros(len(pixels), dtype=torch.long, device=pixels.device)
            texts = (batch.get("context_ids"), batch.get("context_mask"))
            return self.model.visual_tokens(pixels, rows, *texts)

        if context != self._cached_context:  # the first question was interrupted
            self._feature_cache.clear()
            self._cached_context = context
        with torch.no_grad():
            self._feature_cache.bind(self.model)
            return {"visual_tokens": self._feature_cache.tokens(batch["pixel_values"], encode)}

    def _check_room(self, num_tokens: int, max_new_tokens: int) -> None:
        config = self.model.llm.model.config
        positions = getattr(config, "max_position_embeddings", None)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
        if positions is not None and num_tokens + max_new_tokens > positions:
            raise ValueError(
                f"the conversation has {num_tokens} tokens; with max_new_tokens={max_new_tokens} "
                f"it is longer than the LLM's {positions} positions: reset() the session, give "
                "fewer images, or lower max_new_tokens"
            )


def _loaded(images: Sequence[str | Path | Image.Image]) -> list[Image.Image]:
    if isinstance(images, (str, Path, Image.Image)):
        raise ValueError(f"images must be a list, got {images!r}; put it in brackets")
    return [i if isinstance(i, Image.Image) else load_image(i) for i in images]
