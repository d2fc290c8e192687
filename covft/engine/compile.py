"""torch.compile, block by block: every ViT block and every layer of the LLM by itself.

Blocks of one kind share their compiled code, so that a model compiles in the time of a few blocks.
They are compiled in place: names of parameters stay, and what distributed engines hook to a block
stays outside its graph. What is between the blocks (embedding, merging, loss) isn't compiled: it is
a small part of a step, and reads counts from the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from covft.checkpoints.trainable import unwrapped
from covft.registry import check_arguments

#: Graphs that a block's code may have: with and without gradients at its input, recomputed or not,
#: for no, one and several images, at a first and at any number of tokens.
_NUM_GRAPHS = 64


def compile_blocks(model: nn.Module, setting: bool | Mapping[str, Any] | None) -> int:
    """Compile the blocks of a model's vision encoder and LLM for training.

    Args:
        model: The model, before an engine wraps it.
        setting: What a config says: False or None for nothing, True, or ``dict(mode=...,
            vision=..., llm=...)``, the arguments of :class:`CompileOptions`.

    Returns:
        The number of compiled blocks.

    Raises:
        ValueError: If an option is unknown, or nothing would be compiled.
    """
    options = checked_compile(setting)
    if options is None:
        return 0
    parts: Any = unwrapped(model)
    blocks = [*(parts.vision.backbone.blocks if options.vision else ())]
    blocks += parts.llm.layers if options.llm else []
    if not blocks:
        raise ValueError(
            "compile: the model has no block of the kinds asked for; set compile=False"
        )
    dynamo = torch._dynamo.config
    # All blocks run the code of nn.Module.__call__, which counts as one function.
    dynamo.recompile_limit = max(dynamo.recompile_limit, _NUM_GRAPHS)
    # It would split graphs, so that DDP can exchange gradients before all are there: blocks are
    # that already, and it can't split one that recomputes.
    dynamo.optimize_ddp = False
    for block in blocks:
        block.compile(mode=options.mode, backend=options.backend, fullgraph=options.fullgraph)
    return len(blocks)


class CompileOptions:
    """What to compile, and how.

    Args:
        vision: Whether the vision encoder's blocks are compiled.
        llm: Whether the LLM's layers are compiled.
        mode: torch.compile's, such as "max-autotune-no-cudagraphs"; None is its default.
        backend: torch.compile's.
        fullgraph: Raise an error where a block can't be compiled as one graph, instead of running
            it as several with Python in between.

    Raises:
        ValueError: If nothing is left to compile.
    """

    def __init__(
        self,
        *,
        vision: bool = True,
        llm: bool = True,
        mode: str | None = None,
        backend: str = "inductor",
        fullgraph: bool = False,
    ) -> None:
        if not (vision or llm):
            raise ValueError(
                "compile=dict(vision=False, llm=False) leaves nothing to compile; set compile=False"
            )
        self.vision, self.llm, self.mode = vision, llm, mode
        self.backend, self.fullgraph = backend, fullgraph


def checked_compile(setting: bool | Mapping[str, Any] | None) -> CompileOptions | None:
    """Return what a config's ``compile`` asks for; None if it is nothing.

    Raises:
        ValueError: If it isn't True, False or a dict of known options.
    """
    if setting is None or setting is False:
        return None
    if setting is True:
        return CompileOptions()
    if not isinstance(setting, Mapping):
        raise ValueError(f"compile must be True, False or dict(mode=..., ...), got {setting!r}")
    check_arguments(CompileOptions, setting, where="compile")
    return CompileOptions(**setting)
