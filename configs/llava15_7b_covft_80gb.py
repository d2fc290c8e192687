"""LLaVA-1.5-7B, CoVFT on one GPU with 80 GB.

No row of the paper: method, data and steps of Table 1's 7B "CoVFT" in less memory. Weights,
gradients and activations are in bfloat16; the float32 weights that the optimizer needs are those
and their lower halves; moments are in 8 bits (:mod:`covft.engine.bf16_adamw`). Samples are packed,
blocks compiled, and as few of them recomputed as the budgets below allow. A step's 128 samples are
16 micro-batches of 8, whose gradients are added up in bfloat16 and so are rounded to 8 significant
bits after each.

Bytes in stage 2, from ``covft.engine.state_memory.training_memory`` for micro-batches of 7,072
tokens (8 samples of 576 + 308) with 8 images, in 10^9:

    weights 15.17, gradients 14.56, lower halves 14.56, moments 14.79            59.09
    activations that blocks keep, at most (recomputing all would take 2.3)       11.00

What an H100 with 80 GB leaves besides, about 14, is for one block's activations, chunks of logits
and of the optimizer's arithmetic, and the allocator. Needs ``pip install 'covft[train]'``. It was
built and counted, not yet run on a GPU.
"""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_covft import *

from covft.engine import BF16AdamW

model.update(dtype="bfloat16")
model.vision.backbone.update(checkpointing=dict(budget_gb=3))
model.llm.update(checkpointing=dict(budget_gb=8))
train_dataloader.update(batch_size=8, pack=True)
train_cfg.update(accumulation=16)
optim_wrapper.optimizer.update(type=BF16AdamW, compile=True)
compile = True

# Only the projector trains: the LLM's activations may take what stage 2 needs for its state.
stages.pretrain.model.llm.update(checkpointing=dict(budget_gb=32))
stages.pretrain.train_dataloader.update(batch_size=32, pack=True)
stages.pretrain.train_cfg.update(accumulation=8)
stages.pretrain.optim_wrapper.optimizer.update(type=BF16AdamW, compile=True)
