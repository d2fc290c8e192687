"""LLaVA-1.5's stage 1: one epoch of 256 samples a step, as 8 processes x 32.

On another number of processes, change ``batch_size`` or ``train_cfg.accumulation`` so that the
product of the three stays 256.
"""

from torch.optim import AdamW

from covft.engine import CosineWarmup

train_dataloader = dict(batch_size=32, num_workers=4)
train_cfg = dict(max_epochs=1, accumulation=1)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.0), clip_grad=dict(max_norm=1.0)
)
param_scheduler = dict(type=CosineWarmup, warmup_ratio=0.03)
