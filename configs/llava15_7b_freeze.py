"""LLaVA-1.5-7B, frozen encoder: CoVFT's Table 1, 7B "Freeze" (the paper's mean: 58.93).

The base of the other LLaVA-1.5 recipes, which change ``model`` alone. As in LLaVA-1.5 (Liu et al.,
CVPR 2024), stage 1 trains the projector on captions; stage 2 trains LLM and projector on
instructions and, by the method, the vision encoder. What stands outside ``stages`` is stage 2's.
For 8 processes, see ``_base_/schedule``.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.data.llava_mix665k import *
    from ._base_.data.llava_pretrain_558k import train_dataset as _captions
    from ._base_.llm.vicuna_7b import llm
    from ._base_.schedule.llava15_finetune import *
    from ._base_.schedule.llava15_pretrain import optim_wrapper as _pretrain_optim_wrapper
    from ._base_.schedule.llava15_pretrain import param_scheduler as _pretrain_param_scheduler
    from ._base_.schedule.llava15_pretrain import train_cfg as _pretrain_train_cfg
    from ._base_.schedule.llava15_pretrain import train_dataloader as _pretrain_dataloader
    from ._base_.text.bert_base import text_encoder
    from ._base_.vision.clip_l_336 import vision_backbone

from covft.models import MLLM, MLPProjector
from covft.vft import Freeze

model = dict(
    type=MLLM,
    vision=dict(backbone=dict(**vision_backbone, checkpointing=True), vft=dict(type=Freeze)),
    projector=dict(type=MLPProjector),
    llm=dict(**llm, checkpointing=True),
    text_encoder=text_encoder,
)
checkpoint = dict(interval=1000, max_keep=1, save_last=False)

stages = dict(
    pretrain=dict(
        model=dict(
            vision=dict(vft=dict(_delete_=True, type=Freeze)),
            llm=dict(freeze=True),
            template="plain",
        ),
        train_dataset=dict(_delete_=True, **_captions),
        train_dataloader=dict(_delete_=True, **_pretrain_dataloader),
        train_cfg=dict(_delete_=True, **_pretrain_train_cfg),
        optim_wrapper=dict(_delete_=True, **_pretrain_optim_wrapper),
        param_scheduler=dict(_delete_=True, **_pretrain_param_scheduler),
    ),
    finetune=dict(),
)
seed = 0
