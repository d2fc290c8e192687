"""Quickstart: CoVFT on DINOv2-S, SmolLM2-135M and easy-VQA, in minutes on a laptop CPU.

As in LLaVA-1.5, stage 1 trains the projector on captions, stage 2 the LLM, the projector and, by
the VFT method, the vision encoder on questions. What stands outside ``stages`` is stage 2's.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.llm.smollm2_135m import llm
    from ._base_.text.minilm_l6 import text_encoder
    from ._base_.vision.dinov2_small import vision_backbone

from torch.optim import AdamW

from covft.datasets import EasyVQADataset
from covft.engine import CosineWarmup
from covft.evaluation import EasyVQA
from covft.models import MLLM, PixelShuffleProjector
from covft.vft import CoVFT, Freeze

model = dict(
    type=MLLM,
    vision=dict(backbone=vision_backbone, vft=dict(type=CoVFT)),
    projector=dict(type=PixelShuffleProjector, init_scale=2.0),
    llm=dict(**llm, freeze_embeddings=True),
    text_encoder=text_encoder,
    template="qa",
)
train_dataset = dict(type=EasyVQADataset, kind="conversations", balanced=True)
train_dataloader = dict(batch_size=4, group="length")
train_cfg = dict(max_iters=110)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0),
    lr={"vision": "method"},
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = dict(type=CosineWarmup, warmup_ratio=0.05)
checkpoint = dict(interval=50, max_keep=1, save_last=False)
logging = dict(interval=5, preview_interval=50)

stages = dict(
    pretrain=dict(
        model=dict(vision=dict(vft=dict(_delete_=True, type=Freeze)), llm=dict(freeze=True)),
        train_dataset=dict(_delete_=True, type=EasyVQADataset, kind="captions"),
        train_dataloader=dict(batch_size=8, group="none"),
        train_cfg=dict(max_iters=160),
        optim_wrapper=dict(
            _delete_=True,
            optimizer=dict(type=AdamW, lr=4e-3, weight_decay=0.0),
            clip_grad=dict(max_norm=1.0),
        ),
    ),
    finetune=dict(),
)

evaluation = dict(
    benchmark=dict(type=EasyVQA, limit=1000),
    blind=True,
    batch_size=50,
    compare_with=["quickstart_covft", "quickstart_freeze", "quickstart_full"],
)
seed = 0
