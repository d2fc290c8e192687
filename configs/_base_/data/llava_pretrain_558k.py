"""LLaVA-1.5's stage 1: 558,128 images with captions (liuhaotian/LLaVA-Pretrain on the hub)."""

from covft.datasets import InstructDataset

train_dataset = dict(
    type=InstructDataset,
    annotations="data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    image_root="data/LLaVA-Pretrain/images",
    max_length=2048,
)
