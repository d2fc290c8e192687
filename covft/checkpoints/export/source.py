"""What the formats are written from: a run, and what is common to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from covft.checkpoints.layouts import LAYOUTS
from covft.checkpoints.layouts.base import part_of, plain_llm_state, tied_names
from covft.checkpoints.run import Run
from covft.config import stage_configs
from covft.models.mllm import MLLM


@dataclass(frozen=True)
class Source:
    """A run that is being exported, its model on the CPU.

    Attributes:
        run: The run.
    """

    run: Run

    @property
    def model(self) -> MLLM:
        """The run's model."""
        return self.run.model

    @property
    def model_cfg(self) -> dict[str, Any]:
        """The config that the model was built from: the last stage's."""
        cfg: dict[str, Any] = stage_configs(self.run.config)[-1][1].model.to_dict()
        return cfg

    def state(self) -> dict[str, Tensor]:
        """Return all tensors of the model, the LLM's as plain weights, tied ones under one name."""
        own = {k: v for k, v in self.model.state_dict().items() if part_of(k) != "llm"}
        tied = tied_names(self.model)
        state = {**own, **plain_llm_state(self.model)}
        return {k: v for k, v in state.items() if k not in tied}

    def public_state(self, layout: str) -> dict[str, Tensor]:
        """Return the model's tensors in one of :data:`LAYOUTS`.

        Raises:
            ValueError: If the layout can't hold the model; names a format that can.
        """
        try:
            return LAYOUTS[layout].from_ours(None, self.model)
        except ValueError as error:
            raise ValueError(f"--to {layout}: {error}. --to hf holds every model") from error

    def stop_token_ids(self) -> list[int]:
        """Return the token ids that end an answer."""
        return self.run.spec.template.stop_token_ids(self.run.spec.tokenizer)

    def generation_config(self) -> dict[str, Any]:
        """Return transformers' generation_config.json: greedy, and the ids that end an answer."""
        stops = self.stop_token_ids()
        tokenizer = self.run.spec.tokenizer
        return {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": stops,
            "pad_token_id": stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            "do_sample": False,
        }


def compute_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """Return the type that holds every floating-point tensor exactly: transformers loads one."""
    dtype = None
    for value in state.values():
        if value.is_floating_point():
            dtype = value.dtype if dtype is None else torch.promote_types(dtype, value.dtype)
    return dtype or torch.float32
