"""One vision transformer for every encoder family (Dosovitskiy et al., ICLR 2021).

Its inside is what visual fine-tuning changes, so it is kept plain: ``blocks.{i}`` holds ``norm1``,
``attn``, ``ls1``, ``norm2``, ``mlp``, ``ls2``. Attention, MLP and block all get the context (frozen
features of the instruction) as an argument, so that a method may replace any of them, and so that
gradient checkpointing recomputes with the same context.

Shapes: I images, N patch tokens, P prefix tokens (CLS, then registers), T = P + N, D = hidden_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covft.models.checkpointing import RUN, CheckpointedBlock, CheckpointingPolicy, Mode, Setting
from covft.models.vision.rope import rope_tables, rotate_patches
from covft.registry import nearest

Rope = tuple[Tensor, Tensor]

INIT_STD = 0.02


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``: CLIP was trained with it, and its weights need it."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to a tensor of any shape."""
        return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


def activation(name: str) -> nn.Module:
    """Return the activation of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation '{name}' is unknown; {nearest(name, _ACTIVATIONS)}")
    return _ACTIVATIONS[name]()


@dataclass(frozen=True)
class ViTConfig:
    """The architecture of a :class:`ViT`.

    Attributes:
        image_size: Side of the square input, in pixels.
        patch_size: Side of a patch; pixels beyond the last whole patch are cut off.
        hidden_dim: Width D of the tokens.
        depth: Number of blocks of the published encoder, those after the selected one included.
        num_heads: Attention heads.
        mlp_dim: Hidden width of the MLP.
        act: Activation of the MLP.
        norm_eps: Epsilon of every LayerNorm.
        use_cls: Whether a CLS token precedes the patches.
        num_registers: Register tokens after the CLS token.
        pos_embed: ``learned`` (one vector a patch, and one for CLS) or ``rope`` (patches only).
        patch_bias: Whether the patch convolution has a bias.
        qkv_bias: Whether the query, key and value projections have biases.
        k_bias: False leaves out the key's bias alone.
        pre_norm: Whether a LayerNorm precedes the first block.
        layer_scale: Initial value of the layer scales; None builds none.
        drop_path: DropPath rate of the last block; it grows linearly from 0 at the first.
        rope_theta: Base of the rotary periods.
    """

    image_size: int
    patch_size: int
    hidden_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    act: Literal["quick_gelu", "gelu", "gelu_tanh"] = "gelu"
    norm_eps: float = 1e-6
    use_cls: bool = True
    num_registers: int = 0
    pos_embed: Literal["learned", "rope"] = "learned"
    patch_bias: bool = True
    qkv_bias: bool = True
    k_bias: bool = True
    pre_norm: bool = False
    layer_scale: float | None = None
    drop_path: float = 0.0
    rope_theta: float = 100.0

    def __post_init__(self) -> None:
        activation(self.act)
        if self.pos_embed not in ("learned", "rope"):
            raise ValueError(f"pos_embed must be 'learned' or 'rope', got '{self.pos_embed}'")
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"hidden_dim ({self.hidden_dim}) must be a multiple of num_heads ({self.num_heads})"
            )
        if self.pos_embed == "rope" and self.head_dim % 4:
            raise ValueError(
                f"rope needs a head width that is a multiple of 4, got {self.head_dim}"
                " (hidden_dim / num_heads)"
            )
        if self.grid < 1:
            raise ValueError(
                f"image_size ({self.image_size}) is smaller than patch_size ({self.patch_size})"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_dim // self.num_heads

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: CLS and registers."""
        return int(self.use_cls) + self.num_registers


class Attention(nn.Module):
    """Multi-head self-attention with separate projections."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(dim, dim, bias=config.qkv_bias and config.k_bias)
        self.v_proj = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Any, rope: Rope | None = None) -> Tensor:
        """Mix the tokens; ``context`` is for methods that replace this module.

        Args:
            x: Normalised tokens, (I, T, D).
            context: Not used here.
            rope: Cosines and sines for the last N tokens, each (N, D / heads).

        Returns:
            (I, T, D).
        """
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rope is not None:
            query, key = rotate_patches(query, *rope), rotate_patches(key, *rope)
        return self.out_proj(attend(query, key, value))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the heads' outputs side by side, (I, T, D).

    Args:
        query: (I, heads, T, D / heads).
        key: (I, heads, K, D / heads).
        value: Like ``key``.
        mask: True where a query may attend, broadcastable to (I, heads, T, K).
    """
    if query.shape[0]:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    else:
        # A batch without images: flash kernels refuse it (pytorch/pytorch#133780), but the
        # parameters must stay in the graph for distributed training.
        mixed = (query @ key.transpose(-1, -2)).softmax(-1) @ value
    return mixed.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """The feed-forward network of a block."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_dim, config.mlp_dim)
        self.act = activation(config.act)
        self.fc2 = nn.Linear(config.mlp_dim, config.hidden_dim)

    def forward(self, x: Tensor, context: Any) -> Tensor:
        """Transform each token of ``x`` (I, T, D); ``context`` is for methods that replace this."""
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al., ICCV 2021)."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of ``x`` (..., D)."""
        return x * self.gamma


class DropPath(nn.Module):
    """Drop a residual branch for whole images in training (Huang et al., ECCV 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Zero each image of ``x`` (I, T, D) at the rate; scale the others to keep the mean."""
        if not self.training:
            return x
        keep = 1 - self.rate
        # Arithmetic instead of bernoulli_(keep), which torch.compile would compile for each rate.
        kept = (torch.rand(x.shape[0], 1, 1, device=x.device) + keep).floor()
        return x * (kept / keep).to(x.dtype)

    def extra_repr(self) -> str:
        """Show the rate in the printed model."""
        return f"rate={self.rate:.3f}"


class Block(CheckpointedBlock):
    """A pre-norm transformer block."""

    def __init__(self, config: ViTConfig, *, drop_path: float = 0.0) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = _layer_scale(config)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.ls2 = _layer_scale(config)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def run(self, x: Tensor, context: Any, rope: Rope | None = None) -> Tensor:
        """Add the attention's and then the MLP's branch to the tokens.

        Args:
            x: Tokens, (I, T, D).
            context: Handed to ``attn`` and ``mlp``; None where no method needs it.
            rope: Handed to ``attn``.

        Returns:
            (I, T, D).
        """
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), context, rope)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x), context)))


def _run(
    blocks: Sequence[nn.Module],
    modes: Sequence[Mode] | None,
    x: Tensor,
    context: Any,
    rope: Rope | None,
) -> Tensor:
    """Run blocks, each in its mode of recomputation; None where there is no backward pass."""
    for index, block in enumerate(blocks):
        # Nothing is kept for a block without gradients, and compiled it couldn't recompute.
        mode = modes[index] if modes is not None and _has_gradient(block, x) else None
        if isinstance(block, CheckpointedBlock):
            if modes is not None:
                block.mode = mode
            x = block(x, context, rope)
        elif mode is not None:  # what a method of one's own has put in a block's place
            x = RUN[mode](block, x, context, rope)
        else:
            x = block(x, context, rope)
    return x


def _has_gradient(block: nn.Module, x: Tensor) -> bool:
    return x.requires_grad or any(p.requires_grad for p in block.parameters())


def _layer_scale(config: ViTConfig) -> nn.Module:
    if config.layer_scale is None:
        return nn.Identity()
    return LayerScale(config.hidden_dim, config.layer_scale)


class ViT(nn.Module):
    """A vision transformer up to the layer that the MLLM reads.

    Args:
        config: The architecture.
        select_layer: Which hidden state is the output: k > 0 is the output of the k-th block, -1
            the last block's, -2 the next-to-last's. Blocks after it aren't built: their parameters
            would never get a gradient.
        final_norm: Apply the encoder's last LayerNorm to the output.
        checkpointing: Which blocks are computed again in the backward pass instead of keeping their
            activations: one of the policies of :mod:`covft.models.checkpointing`.

    Raises:
        ValueError: If the layer doesn't exist, or ``final_norm`` is asked of another than the last.
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        select_layer: int = -1,
        final_norm: bool = False,
        checkpointing: Setting = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.select_layer = _selected(select_layer, config.depth)
        self.checkpointing = checkpointing
        if final_norm and self.select_layer != config.depth:
            raise ValueError(
                f"final_norm=True belongs to the last of {config.depth} blocks, but select_layer="
                f"{select_layer} reads block {self.select_layer}; set select_layer=-1 or "
                "final_norm=False"
            )
        dim = config.hidden_dim
        self.patch_embed = nn.Conv2d(
            3, dim, config.patch_size, stride=config.patch_size, bias=config.patch_bias
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.use_cls else None
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, config.num_registers, dim))
            if config.num_registers
            else None
        )
        self.pos_embed = (
            nn.Parameter(torch.zeros(1, self.num_tokens + int(config.use_cls), dim))
            if config.pos_embed == "learned"
            else None
        )
        self.pre_norm = nn.LayerNorm(dim, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        step = config.drop_path / max(config.depth - 1, 1)
        self.blocks = nn.ModuleList(
            Block(config, drop_path=step * index) for index in range(self.select_layer)
        )
        self.final_norm = nn.LayerNorm(dim, eps=config.norm_eps) if final_norm else nn.Identity()
        self._init_weights()

    @property
    def checkpointing(self) -> Setting:
        """The policy, as a config has it; False and True stand for "none" and "full"."""
        return self._checkpointing.setting

    @checkpointing.setter
    def checkpointing(self, setting: Setting) -> None:
        where = "model.vision.backbone.checkpointing"
        self._checkpointing = CheckpointingPolicy(setting, where=where)

    @property
    def hidden_dim(self) -> int:
        """Width D of the output."""
        return self.config.hidden_dim

    @property
    def num_tokens(self) -> int:
        """Patch tokens N of an image: the output's length."""
        return self.config.grid**2

    @property
    def num_prefix(self) -> int:
        """Tokens P before the patches inside the encoder: CLS and registers."""
        return self.config.num_prefix

    def forward(self, pixels: Tensor, context: Any = None) -> Tensor:
        """Encode images.

        Args:
            pixels: Normalised pixels, (I, 3, S, S) with S = image_size.
            context: Handed to every block.

        Returns:
            The selected layer's patch tokens, (I, N, D).
        """
        return self.output(self.run_blocks(self.embed(pixels), context))

    def run_blocks(
        self, x: Tensor, context: Any = None, *, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Run the blocks from ``start`` up to, but without, ``stop``.

        Args:
            x: The input of block ``start``, (I, T, D).
            context: Handed to every block.
            start: The first block to run.
            stop: The block not to run any more; None: run the last one, too.

        Returns:
            Tokens, (I, T, D).
        """
        rope = self._rope(x.device)
        blocks = list(self.blocks)
        if not (self.training and torch.is_grad_enabled()):
            return _run(blocks[start:stop], None, x, context, rope)
        with self._checkpointing.modes(blocks, x) as modes:
            return _run(blocks[start:stop], modes[start:stop], x, context, rope)

    def output(self, x: Tensor) -> Tensor:
        """Return the patch tokens (I, N, D) of the last block's output (I, T, D), normed."""
        return self.final_norm(x)[:, self.num_prefix :]

    def embed(self, pixels: Tensor) -> Tensor:
        """Return the first block's input, (I, T, D): CLS, registers and patches."""
        x = self.patch_embed(pixels.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        if self.register_tokens is not None:
            place = int(self.config.use_cls)
            registers = self.register_tokens.expand(x.shape[0], -1, -1)
            x = torch.cat((x[:, :place], registers, x[:, place:]), dim=1)
        return self.pre_norm(x)

    def _rope(self, device: torch.device) -> Rope | None:
        config = self.config
        if config.pos_embed != "rope":
            return None
        return rope_tables(config.grid, config.head_dim, theta=config.rope_theta, device=device)

    @torch.no_grad()
    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.register_tokens, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=INIT_STD)


def _selected(select_layer: int, depth: int) -> int:
    """Return which block's output is read, counted from 1."""
    layer = select_layer if select_layer > 0 else depth + 1 + select_layer
    if select_layer == 0 or not 1 <= layer <= depth:
        raise ValueError(
            f"select_layer={select_layer} doesn't exist: the encoder has {depth} blocks; "
            f"use 1..{depth} (output of that block) or -1..-{depth} (-1: the last block)"
        )
    return layer
