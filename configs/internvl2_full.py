"""InternVL 2.0, Full: CoVFT's Table 3, InternVL 2.0 "Full ft." (the paper's mean: 67.51).

InternViT-300M up to its last block, pixel shuffle and MLP, Phi-3-mini; up to 6 tiles of 448 px and
a thumbnail, 256 tokens each. As in the paper's section 4.1, stage 1 trains the projector on LLaVA's
captions, stage 2 everything on LLaVA's instructions. What stands outside ``stages`` is stage 2's.

Choices, where the paper says nothing about this model: it starts from InternViT and Phi-3, each as
its authors published it, and not from an InternVL2-4B; its data are those of the other rows; stage
1 has the other rows' schedule, and the same tiles as stage 2, so that all resolutions agree; stage
2's schedule is InternVL's own, see ``_base_/schedule``.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.data.llava_mix665k import *
    from ._base_.data.llava_pretrain_558k import train_dataset as _captions
    from ._base_.llm.phi3_mini import llm
    from ._base_.schedule.internvl2_finetune import *
    from ._base_.schedule.llava15_pretrain import optim_wrapper as _pretrain_optim_wrapper
    from ._base_.schedule.llava15_pretrain import param_scheduler as _pretrain_param_scheduler
    from ._base_.schedule.llava15_pretrain import train_cfg as _pretrain_train_cfg
    from ._base_.schedule.llava15_pretrain import train_dataloader as _pretrain_dataloader
    from ._base_.text.bert_base import text_encoder
    from ._base_.vision.internvit_300m_448 import vision_backbone

from covft.models import MLLM, PixelShuffleProjector
from covft.vft import Freeze, Full

model = dict(
    type=MLLM,
    vision=dict(
        backbone=dict(**vision_backbone, drop_path=0.1, checkpointing=True), vft=dict(type=Full)
    ),
    projector=dict(type=PixelShuffleProjector),
    llm=dict(**llm, checkpointing=True),
    text_encoder=text_encoder,
)
train_dataset.resize = "tiles"
train_dataset.max_tiles = 6
train_dataset.max_length = 4096
checkpoint = dict(interval=1000, max_keep=1, save_last=False)

stages = dict(
    pretrain=dict(
        model=dict(
            vision=dict(vft=dict(_delete_=True, type=Freeze)),
            llm=dict(freeze=True),
            template="plain",
        ),
        train_dataset=dict(_delete_=True, **_captions, resize="tiles", max_tiles=6),
        train_dataloader=dict(_delete_=True, **_pretrain_dataloader),
        train_cfg=dict(_delete_=True, **_pretrain_train_cfg),
        optim_wrapper=dict(_delete_=True, **_pretrain_optim_wrapper),
        param_scheduler=dict(_delete_=True, **_pretrain_param_scheduler),
    ),
    finetune=dict(),
)
seed = 0
