"""LLaVA-1.5's stage 2: one epoch of 128 samples a step, as 8 processes x 16.

A step holds samples with images or samples without, of similar lengths in each micro-batch. The
vision encoder trains at the learning rate of its method. On another number of processes, change
``batch_size`` or ``train_cfg.accumulation`` so that the product of the three stays 128.
"""

from torch.optim import AdamW

from covft.engine import CosineWarmup

train_dataloader = dict(batch_size=16, num_workers=4, group="modality_length")
train_cfg = dict(max_epochs=1, accumulation=1)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=2e-5, weight_decay=0.0),
    lr={"vision": "method"},
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = dict(type=CosineWarmup, warmup_ratio=0.03)
