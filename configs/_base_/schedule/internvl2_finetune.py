"""InternVL 2.0's fine-tuning: one epoch of 128 samples a step, as 8 processes x 4 x 4.

From OpenGVLab's public scripts (``internvl_chat/shell/internvl2.0/2nd_finetune``, full). Choice:
their weight decay of 0.01 (2B) for this size, too, where one has 0.05. Everything that trains does
so at one rate, the vision encoder included. On another number of processes, change ``batch_size``
or ``train_cfg.accumulation`` so that the product of the three stays 128.
"""

from torch.optim import AdamW

from covft.engine import CosineWarmup

train_dataloader = dict(batch_size=4, num_workers=4, group="length")
train_cfg = dict(max_epochs=1, accumulation=4)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=4e-5, betas=(0.9, 0.999), weight_decay=0.01),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = dict(type=CosineWarmup, warmup_ratio=0.03)
