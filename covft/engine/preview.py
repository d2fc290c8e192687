"""What a model answers to a few fixed training questions, for the log."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from covft.conversation import checked_turns
from covft.datasets.annotations import image_paths
from covft.datasets.base import ConversationDataset
from covft.datasets.prompts import Prompt, generate_answers
from covft.images import load_image
from covft.models.mllm import MLLM


class AnswerPreview:
    """Generates answers to the first questions of some samples of a dataset.

    Args:
        dataset: Where the samples come from.
        indices: Which of them; those whose images can't be read are passed over.
        max_new_tokens: Longest answer in tokens.
    """

    def __init__(
        self, dataset: ConversationDataset, indices: Sequence[int], *, max_new_tokens: int = 24
    ) -> None:
        self.dataset, self.indices, self.max_new_tokens = dataset, indices, max_new_tokens

    def __call__(self, model: nn.Module) -> list[str]:
        """Return a line per sample: the question, the expected answer and the model's."""
        spec = self.dataset.spec
        prompts, expected = [], []
        for index in self.indices:
            record = self.dataset.record(index)
            turns = checked_turns(record["conversations"], answered=True)
            try:
                images = [load_image(self.dataset.image_root / p) for p in image_paths(record)]
            except ValueError:
                continue
            prompts.append(Prompt(str(record.get("id", index)), turns[:1], images))
            expected.append(turns[1]["value"])
        if not prompts:
            return []
        assert isinstance(model, MLLM)
        answers = generate_answers(
            model, prompts, spec, max_new_tokens=self.max_new_tokens, resize=self.dataset.resize
        )
        return [
            f"{_last_line(p.turns[0]['value'])!r}: expected {wanted!r}, generated {answer!r}"
            for p, wanted, answer in zip(prompts, expected, answers, strict=True)
        ]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
