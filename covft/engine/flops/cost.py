"""What a sample costs in training, in three numbers that packing balances by."""

from __future__ import annotations

import logging

from mmengine.logging import print_log

from covft.datasets.packing import CostModel
from covft.engine.flops.model import FlopModel, Work
from covft.models.mllm import MLLM

#: Tokens of an image's instruction, for encoders that read them; LLaVA's have about so many. Costs
#: hardly depend on it: an image has hundreds of tokens of its own.
_TEXT_TOKENS = 32


def cost_model(model: MLLM) -> CostModel:
    """Return what samples cost a model in a training step, by :class:`FlopModel`.

    Left out are the output layer, which sees supervised positions alone, and the text encoder.
    Layers with a sliding window are taken to see all of a sample.

    Args:
        model: The model, its parameters frozen as in training; it may be on the meta device.

    Returns:
        The costs; those of tokens alone, and a line in the log, if a part of the model has no
        counter.
    """
    try:
        flops = FlopModel(model)
    except ValueError as error:
        print_log(
            f"packing balances tokens alone, the operations can't be counted: {error}",
            logger="current",
            level=logging.WARNING,
        )
        return CostModel()
    # A sample of t tokens costs a t + b t**2, so that two of them give both numbers.
    one, two = (flops.parts(Work((length,), 0))["llm"].total for length in (1, 2))
    per_pair = (two - 2 * one) / 2
    square = flops.parts(Work((), 0, image_texts=(_TEXT_TOKENS,)))
    return CostModel(one - per_pair, per_pair, square["vision"].total + square["projector"].total)
