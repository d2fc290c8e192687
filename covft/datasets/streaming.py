"""An answer as text, piece by piece, while the model writes it."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from covft.datasets.spec import InputSpec
from covft.models.mllm import MLLM


def answer_text(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return an answer's text, without white space around it or half a character at its end.

    Args:
        token_ids: What was generated, without the stop token.
        tokenizer: The LLM's.
    """
    # The clean-up of spaces would rewrite text that has been streamed already.
    options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ids = list(token_ids)
    whole = text = str(tokenizer.decode(ids, **options))
    # U+FFFD stands for bytes that are no character, or none yet: all bytes since the last token
    # that isn't one may be shown so. A character has up to four.
    for _ in range(3):
        if not text.endswith("\ufffd"):
            break
        ids.pop()
        text = str(tokenizer.decode(ids, **options))
    return (whole if text.endswith("\ufffd") else text).strip()


class StreamedText:
    """Turns token ids, one after another, into text that never has to be taken back.

    Held back until further tokens tell are: white space, which no answer ends in; a character of
    which only some bytes are there; what may become a stop string. All ids are decoded each time: a
    token by itself has no space before it in SentencePiece, and may be a part of a character. (A
    thousand tokens take less than a second in all.)

    Args:
        tokenizer: The LLM's.
        stop: Texts at which the answer ends; they aren't part of it.

    Attributes:
        stopped: Whether a stop string has come.

    Raises:
        ValueError: If a stop string is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"stop must be a list of texts that aren't empty, got {stop!r}")
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._text = ""
        self._num_given = 0

    def add(self, token_ids: Sequence[int]) -> str:
        """Return the text that further tokens make certain, often none."""
        if self.stopped or not token_ids:
            return ""
        self._ids += token_ids
        text = answer_text(self._ids, self._tokenizer)
        ends = [text.find(stop) for stop in self._stop if stop in text]
        self.stopped = bool(ends)
        self._text = text[: min(ends)].rstrip() if ends else text
        held = 0 if ends else max((_overlap(text, stop) for stop in self._stop), default=0)
        # Whatever bytes that are no character yet may become.
        return self._given(self._text[: len(self._text) - held].rstrip("\ufffd").rstrip())

    def finish(self) -> str:
        """Return what was held back."""
        return self._given(self._text)

    def _given(self, text: str) -> str:
        start, self._num_given = self._num_given, max(self._num_given, len(text))
        return text[start:]


def stream_answer(
    model: MLLM,
    batch: Mapping[str, Any],
    spec: InputSpec,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    **generation: Any,
) -> Generator[str, None, None]:
    """Yield a model's answer to one prompt, as it is generated.

    Generation runs in a thread of its own and ends when the generator is closed.

    Args:
        model: The model, in eval mode.
        batch: Of :func:`covft.datasets.prompts.prompt_batch`, one prompt.
        spec: The model's side.
        max_new_tokens: Longest answer in tokens.
        stop: Texts at which the answer ends, besides the template's end; not part of it.
        generation: Passed on to :meth:`covft.models.MLLM.generate`.

    Raises:
        ValueError: If a stop string is empty, there is not one prompt, or as ``generate``.
    """
    if len(batch["input_ids"]) != 1:
        raise ValueError(f"one answer is streamed at a time, got {len(batch['input_ids'])} prompts")
    text = StreamedText(spec.tokenizer, stop=stop)
    stops = spec.template.stop_token_ids(spec.tokenizer)
    arguments = dict(max_new_tokens=max_new_tokens, eos_token_id=stops, **generation)
    return _pieces(_Generation(model, {**batch, **arguments}), text, stops)


def _pieces(
    generation: _Generation, text: StreamedText, stops: Sequence[int]
) -> Generator[str, None, None]:
    try:
        for token_ids in generation.tokens():
            piece = text.add([i for i in token_ids if i not in stops])
            if piece:
                yield piece
            if text.stopped:
                break
    finally:
        generation.close()
    if piece := text.finish():
        yield piece


class _Generation(BaseStreamer, StoppingCriteria):
    """One call of ``generate`` in a thread: its streamer, and what stops it early."""

    def __init__(self, model: MLLM, arguments: Mapping[str, Any]) -> None:
        self._model, self._arguments = model, arguments
        self._queue: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()
        self._closed = threading.Event()
        # A thread has no autocast of its own.
        kind = model.device.type
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self._thread = threading.Thread(target=self._run, daemon=True)

    def tokens(self) -> Iterator[list[int]]:
        """Yield new token ids; raise what generation raises."""
        self._thread.start()
        while (found := self._queue.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found

    def close(self) -> None:
        """End generation and wait until it has."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def put(self, value: Tensor) -> None:
        """Take tokens; the prompt's, which come first, are none, since it's given as embeddings."""
        self._queue.put(value.flatten().tolist())

    def end(self) -> None:
        """Do nothing: the end is reported after ``generate`` has returned or failed."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return whether each sample ends here."""
        return torch.full((len(input_ids),), self._closed.is_set(), device=input_ids.device)

    def _run(self) -> None:
        kind, dtype, enabled = self._autocast
        try:
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                self._model.generate(
                    **self._arguments,
                    streamer=self,
                    stopping_criteria=StoppingCriteriaList([self]),
                )
        except BaseException as error:  # raised again where the tokens are read
            self._queue.put(error)
        self._queue.put(None)


def _overlap(text: str, stop: str) -> int:
    """Return how many of the text's last characters may be the beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
