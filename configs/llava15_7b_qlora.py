"""LLaVA-1.5-7B in little memory: frozen encoder, 4-bit LLM with LoRA updates (QLoRA).

No row of the paper. Rank 128, alpha 256 and the LLM's learning rate 2e-4 are those of LLaVA's
finetune_lora.sh, which keeps the projector at 2e-5; NF4 is QLoRA's (Dettmers et al., NeurIPS 2023).
Needs ``pip install 'covft[train]'``.
"""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_freeze import *

model.llm.update(dtype="bfloat16", quantization="nf4", lora=dict(rank=128, alpha=256.0))
optim_wrapper.lr = {"llm": 2e-4, "vision": "method"}
stages.pretrain.model.llm.update(lora=None)
