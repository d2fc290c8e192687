import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from miniature import ARCH as MINIATURE
from torch import Tensor, nn

from covft.models.text_encoder import Context
from covft.models.vision.rope import rope_tables
from covft.models.vision.tower import VisionTower
from covft.models.vision.vit import Attention, ViTConfig
from covft.registry import VFT
from covft.vft.qa_vit import QAViT, QuestionAwareAttention

ARCH = {**MINIATURE, "depth": 4}
CONTEXT_DIM = 24
FAMILIES = ["CLIP", "SigLIP", "DINOv2", "DINOv3", "InternViT"]
HALF = ARCH["depth"] // 2


def make_context(images: int, tokens: int = 5, dtype=torch.float32) -> Context:
    states = torch.randn(images, tokens, CONTEXT_DIM, dtype=dtype)
    return Context(states[:, 0], states, torch.ones(images, tokens, dtype=torch.bool))


def without_text(context: Context) -> Context:
    return dataclasses.replace(context, mask=torch.zeros_like(context.mask))


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def make_tower(family: str = "CLIP", *, random: bool = True, **vft) -> VisionTower:
    torch.manual_seed(0)
    tower = VisionTower(
        backbone=dict(type=family, arch=ARCH), vft=QAViT(**vft), context_dim=CONTEXT_DIM
    )
    if random:
        randomise(tower)
    return tower


def betas(tower: VisionTower) -> list[nn.Parameter]:
    return [p for name, p in tower.named_parameters() if name.endswith(".beta")]


def set_betas(tower: VisionTower, value: float) -> None:
    with torch.no_grad():
        for beta in betas(tower):
            beta.fill_(value)


def pixels(images: int = 3) -> Tensor:
    return torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    return states * cos + torch.cat((-states[..., half:], states[..., :half]), -1) * sin


def plain_attention(attn: QuestionAwareAttention, x: Tensor, text: Tensor, rope) -> Tensor:
    """One image and its real text tokens (K, C), head by head, text and image scored apart."""
    norm, first, _, second = attn.text_proj
    text = text - text.mean(-1, keepdim=True)
    text = text / (text.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    text = F.gelu((text * norm.weight + norm.bias) @ first.weight.T) @ second.weight.T
    query, key, value = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    text_key, text_value = attn.k_proj(text), attn.v_proj(text)
    width = x.shape[-1] // attn.num_heads
    heads = []
    for head in range(attn.num_heads):
        part = slice(head * width, (head + 1) * width)
        q, k = query[:, part], key[:, part]
        if rope is not None:
            places = len(rope[0])
            q = torch.cat((q[:-places], turned(q[-places:], *rope)))
            k = torch.cat((k[:-places], turned(k[-places:], *rope)))
        scores = torch.cat((q @ k.T, q @ text_key[:, part].T), -1) / math.sqrt(width)
        heads.append(scores.softmax(-1) @ torch.cat((value[:, part], text_value[:, part])))
    mixed = torch.cat(heads, -1)
    gated = mixed @ attn.gated_proj.weight.T + attn.gated_proj.bias
    return mixed @ attn.out_proj.weight.T + attn.out_proj.bias + torch.tanh(attn.beta) * gated


@pytest.mark.parametrize("rotary", [False, True])
def test_equals_the_formula_in_float64(rotary: bool) -> None:
    torch.manual_seed(0)
    attn = Attention(ViTConfig(**ARCH, k_bias=not rotary)).requires_grad_(False).double()
    ours = QuestionAwareAttention(attn, context_dim=CONTEXT_DIM, max_text_tokens=6)
    randomise(ours)
    # Prefix tokens, unlike any patch, and a table made in float64.
    rope = rope_tables(4, 8, theta=100.0, device=torch.device("cpu")) if rotary else None
    rope = None if rope is None else tuple(table.double() for table in rope)
    one = torch.randn(3, 21, 32, dtype=torch.float64, requires_grad=True)
    two = one.detach().clone().requires_grad_()
    context = make_context(3, 9, torch.float64)
    context.mask[0, 4:] = False
    context.mask[1] = False

    out = ours(one, context, rope)
    texts = [context.tokens[0, :4], context.tokens[1, :0], context.tokens[2, :6]]
    expected = torch.stack([plain_attention(ours, two[i], texts[i], rope) for i in range(3)])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

    grad = torch.randn_like(out)
    parameters = list(trained(ours).values())
    found = torch.autograd.grad(out, [one, *parameters], grad)
    wanted = torch.autograd.grad(expected, [two, *parameters], grad)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_text_and_gate_equals_the_frozen_encoder(family: str) -> None:
    torch.manual_seed(0)
    frozen = VisionTower(backbone=dict(type=family, arch=ARCH)).eval()
    randomise(frozen.backbone)
    images, context = pixels(), make_context(3)
    expected = frozen(images)
    tuned = VisionTower(backbone=frozen.backbone, vft=QAViT(), context_dim=CONTEXT_DIM).eval()
    assert isinstance(tuned.backbone.blocks[-1].attn, QuestionAwareAttention)
    torch.testing.assert_close(tuned(images, without_text(context)), expected)
    # The text enters at once: the method isn't the frozen encoder at initialisation.
    assert not QAViT.identity_at_init
    assert (tuned(images, context) - expected).abs().max() > 1e-3


def test_at_initialisation_the_gated_projection_is_the_output_projection() -> None:
    attn = make_tower(random=False).backbone.blocks[-1].attn
    assert torch.equal(attn.gated_proj.weight, attn.out_proj.weight)
    assert torch.equal(attn.gated_proj.bias, attn.out_proj.bias)
    assert attn.gated_proj.weight.data_ptr() != attn.out_proj.weight.data_ptr()
    assert attn.beta.tolist() == [0.0]


def test_questions_change_the_features_of_the_fused_blocks_alone() -> None:
    tower = make_tower().eval()
    images = pixels()
    outputs: dict[int, list[Tensor]] = {}
    for index, block in enumerate(tower.backbone.blocks):
        block.register_forward_hook(
            lambda _, __, out, index=index: outputs.setdefault(index, []).append(out)
        )
    tower(images, make_context(3)), tower(images, make_context(3))
    free = tower.vft.context_free_blocks(tower.backbone)
    assert free == HALF
    for index, (one, two) in outputs.items():
        assert torch.equal(one, two) == (index < free), index


def test_padding_and_truncation() -> None:
    tower = make_tower(max_text_tokens=7).double().eval()
    images, context = pixels(), make_context(3, 5, torch.float64)
    expected = tower(images, context)
    garbage = torch.randn(3, 6, CONTEXT_DIM, dtype=torch.float64) * 10
    for left in (True, False):
        states = (garbage, context.tokens) if left else (context.tokens, garbage)
        mask = F.pad(context.mask, (6, 0) if left else (0, 6), value=False)
        padded = Context(context.pooled, torch.cat(states, 1), mask)
        torch.testing.assert_close(tower(images, padded), expected, rtol=1e-12, atol=1e-12)

    long = dataclasses.replace(padded, mask=torch.ones_like(padded.mask))
    cut = Context(long.pooled, long.tokens[:, :7], long.mask[:, :7])
    assert torch.equal(tower(images, long), tower(images, cut))
    assert (tower(images, long) - expected).abs().max() > 1e-3


def test_one_image_without_text_leaves_the_others_alone() -> None:
    tower = make_tower().double().eval()
    images, context = pixels(), make_context(3, 5, torch.float64)
    mixed = dataclasses.replace(context, mask=context.mask.clone())
    mixed.mask[1] = False
    found = tower(images, mixed)
    torch.testing.assert_close(found[[0, 2]], tower(images, context)[[0, 2]])
    torch.testing.assert_close(found[1], tower(images, without_text(context))[1])


def test_a_closed_gate_stops_the_gated_projection_but_not_its_gate() -> None:
    tower = make_tower().train()
    images, context = pixels(), make_context(3)
    set_betas(tower, 0.0)
    closed = tower(images, context)
    closed.square().sum().backward()
    for name, parameter in trained(tower).items():
        gated = "gated_proj" in name
        assert bool(parameter.grad.abs().max() > 0) != gated, name
    for block in tower.backbone.blocks[HALF:]:
        randomise(block.attn.gated_proj)
    assert torch.equal(tower(images, context), closed)
    set_betas(tower, 0.5)
    assert (tower(images, context) - closed).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_what_trains(family: str) -> None:
    tower = make_tower(family).train()
    blocks = len(tower.backbone.blocks)
    names = {"text_proj.0.weight", "text_proj.0.bias", "text_proj.1.weight", "text_proj.3.weight"}
    names |= {"gated_proj.weight", "gated_proj.bias", "beta"}
    expected = {f"backbone.blocks.{i}.attn.{name}" for i in range(HALF, blocks) for name in names}
    assert set(trained(tower)) == expected
    before = copy.deepcopy(tower.state_dict())
    optimizer = torch.optim.SGD(trained(tower).values(), lr=0.1)
    tower(pixels(), make_context(3)).square().sum().backward()
    optimizer.step()
    changed = {n for n, value in tower.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == expected


@pytest.mark.parametrize("family", ["CLIP", "DINOv3", "InternViT"])
def test_gradient_checkpointing_gives_equal_gradients(family: str) -> None:
    grads = []
    for checkpointing in (False, True):
        tower = make_tower(family).train()
        tower.backbone.checkpointing = checkpointing
        torch.manual_seed(1)
        images, context = pixels(), make_context(3)
        tower(images, context).square().sum().backward()
        grads.append({name: p.grad for name, p in trained(tower).items()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


@pytest.mark.parametrize("family", ["CLIP", "DINOv3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_images_keep_every_parameter_in_the_graph(family: str, checkpointing: bool) -> None:
    tower = make_tower(family).train()
    tower.backbone.checkpointing = checkpointing
    features = tower(torch.zeros(0, 3, 32, 32), make_context(0, tokens=70))
    assert features.shape == (0, 16, 32)
    features.sum().backward()
    for name, parameter in trained(tower).items():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("family", ["CLIP", "DINOv3"])
def test_bf16_is_close_to_float32(family: str) -> None:
    tower = make_tower(family).train()
    images, context = pixels(), make_context(3)
    expected = tower(images, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = tower(images, context)
    features.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in trained(tower).values())
    assert (features - expected).norm() < 0.03 * expected.norm()
    whole = tower.bfloat16()(images, context)
    assert whole.dtype == torch.bfloat16
    assert (whole - expected).norm() < 0.05 * expected.norm()


def test_settings_and_context_are_checked() -> None:
    with pytest.raises(ValueError, match="max_text_tokens must be at least 1, got 0"):
        QAViT(max_text_tokens=0)
    for first in (-1, 9):
        with pytest.raises(ValueError, match=rf"first_block is {first}, but the encoder consumes"):
            make_tower(first_block=first)
    with pytest.raises(ValueError, match="first_block is 2, but the encoder consumes 1 blocks"):
        VisionTower(
            backbone=dict(type="CLIP", arch=ARCH, select_layer=1),
            vft=QAViT(),
            context_dim=CONTEXT_DIM,
        )
    with pytest.raises(ValueError, match="text_encoder"):
        VisionTower(backbone=dict(type="CLIP", arch=ARCH), vft=QAViT())
    with pytest.raises(ValueError, match="without context"):
        make_tower()(pixels())
    with pytest.raises(ValueError, match="3 images, but context rows for 2"):
        make_tower()(pixels(3), make_context(2))
    with pytest.raises(ValueError, match="QAViT"):
        make_tower().export_state_dict()


def test_full_size_counts() -> None:
    with torch.device("meta"):
        tower = VisionTower(backbone=dict(type="CLIP"), vft=dict(type="QA-ViT"), context_dim=768)
    assert VFT.get("QAViT") is VFT.get("QA-ViT") is QAViT
    blocks = tower.backbone.blocks
    fused = [i for i, b in enumerate(blocks) if isinstance(b.attn, QuestionAwareAttention)]
    assert fused == list(range(12, 23))
    assert sum(p.numel() for p in trained(blocks[12]).values()) == 2_886_145
    assert sum(p.numel() for p in trained(tower).values()) == 11 * 2_886_145
    pixel_values = torch.zeros(2, 3, 336, 336, device="meta")
    context = Context(
        *(torch.zeros(2, *shape, device="meta") for shape in ((768,), (80, 768))),
        torch.ones(2, 80, dtype=torch.bool, device="meta"),
    )
    assert tower(pixel_values, context).shape == (2, 576, 1024)
