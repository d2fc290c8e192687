"""Miniature encoders tuned by CoVFT's variants, and inputs for them."""

import torch
from miniature import ARCH as MINIATURE
from torch import Tensor, nn

from covft.config import load_config, stage_configs
from covft.models.text_encoder import Context
from covft.models.vision.auxiliary_loss import collect_losses
from covft.models.vision.tower import VisionTower
from covft.registry import MODELS
from covft.vft.comoe import CoMoE
from covft.vft.covft import CoVFT

ARCH = {**MINIATURE, "depth": 4}
WIDTH, TEXT, EXPERTS, IMAGES = 32, 24, 4, 5
FIRST = 2  # of CLIP's three consumed blocks, so that one block alone has CoMoE

VARIANTS = {
    "cve": dict(),
    "text-only": dict(context="text-only"),
    "image-only": dict(context="image-only"),
    "concat": dict(context="concat"),
    "none": dict(context="none"),
    "sparse": dict(routing="sparse@2"),
    "sparse-3-text": dict(routing="sparse@3", context="text-only"),
    "uniform": dict(routing="uniform"),
    "random": dict(routing="random@2"),
}


def make_tower(*, seed: int = 0, checkpointing: bool = False, **vft) -> VisionTower:
    torch.manual_seed(seed)
    backbone = dict(type="CLIP", arch=ARCH, checkpointing=checkpointing)
    method = CoVFT(**{"first_block": FIRST, **vft})
    return VisionTower(backbone=backbone, vft=method, context_dim=TEXT)


def randomise(module: nn.Module, *, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)


def make_inputs(images: int = IMAGES) -> tuple[Tensor, Context]:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = torch.randn(images, 3, TEXT, generator=generator) * 3
    return pixels, Context(tokens[:, 0], tokens, torch.ones(images, 3, dtype=torch.bool))


def in_double(context: Context) -> Context:
    return Context(context.pooled.double(), context.tokens.double(), context.mask)


def comoe_of(tower: VisionTower) -> list[CoMoE]:
    return [block.mlp for block in tower.backbone.blocks if isinstance(block.mlp, CoMoE)]


def gradients(
    tower: VisionTower, images: int = IMAGES, *, context: Context | None = None
) -> dict[str, Tensor | None]:
    torch.manual_seed(3)  # of random routing
    pixels, default = make_inputs(images)
    with collect_losses(tower) as extra:
        features = tower(pixels, context or default)
    (features.square().sum() + sum(extra)).backward()
    return {n: p.grad for n, p in tower.named_parameters() if p.requires_grad}


def make_mllm(options: dict, **vft) -> nn.Module:
    torch.manual_seed(0)
    options = {**options, **{f"model.vision.vft.{k}": v for k, v in vft.items()}}
    model = MODELS.build(stage_configs(load_config("quickstart_covft", options))[-1][1].model)
    randomise(model)
    return model.double().train()
