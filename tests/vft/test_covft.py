import pytest
import torch
from miniature import ARCH as MINIATURE
from torch import Tensor, nn

from covft.models.text_encoder import Context
from covft.models.vision.tower import VisionTower
from covft.models.vision.vit import MLP, ViTConfig
from covft.vft import CoVFT
from covft.vft.comoe import CoMoE

ARCH = {**MINIATURE, "depth": 4}
CONTEXT_DIM = 24
FAMILIES = ["CLIP", "SigLIP", "DINOv2", "DINOv3", "InternViT"]


class PlainResidual(nn.Module):
    def __init__(self, width: int, act) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.ln, self.act = nn.LayerNorm(width), act

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(x + self.fc2(self.act(self.fc1(x))))


class PlainCoMoE(nn.Module):
    """Eq. 7-10 written out: attention over concatenated tokens, one expert after the other."""

    def __init__(self, width: int, hidden: int, context: int, experts: int, act) -> None:
        super().__init__()
        quick = lambda x: x * torch.sigmoid(1.702 * x)  # noqa: E731
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), act, nn.Linear(hidden, width))
            for _ in range(experts)
        )
        self.image_resblock = PlainResidual(width, quick)
        self.text_resblock = PlainResidual(context, quick)
        self.cross_attn = nn.MultiheadAttention(
            context, 4, kdim=width + context, vdim=width + context, batch_first=True
        )
        self.gate = nn.Linear(context, experts)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        image, text = self.image_resblock(x), self.text_resblock(text)[:, None]
        both = torch.cat([image, text.expand(-1, image.shape[1], -1)], dim=-1)
        vector, _ = self.cross_attn(text, both, both)
        gates = self.gate(vector[:, 0]).softmax(-1)
        return sum(gates[:, n, None, None] * e(x) for n, e in enumerate(self.experts))


def make_context(images: int, dtype=torch.float32) -> Context:
    tokens = torch.randn(images, 5, CONTEXT_DIM, dtype=dtype)
    return Context(tokens[:, 0], tokens, torch.ones(images, 5, dtype=torch.bool))


def make_tower(family: str = "CLIP", **vft) -> VisionTower:
    torch.manual_seed(0)
    return VisionTower(
        backbone=dict(type=family, arch=ARCH), vft=CoVFT(**vft), context_dim=CONTEXT_DIM
    )


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def pixels(images: int = 3) -> Tensor:
    return torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8)


@pytest.mark.parametrize("experts", [1, 4])
def test_equals_plain_experts_in_float64(experts: int) -> None:
    torch.manual_seed(0)
    ffn = MLP(ViTConfig(**ARCH)).double()
    ours = CoMoE(
        ffn, context_dim=CONTEXT_DIM, num_experts=experts, activation="quick_gelu"
    ).double()
    randomise(ours)
    ours.cve.k_proj_text.normal_(), ours.cve.k_bias.normal_()
    plain = PlainCoMoE(32, 64, CONTEXT_DIM, experts, ffn.act).double()
    plain.load_state_dict(ours.public_state_dict())

    x1 = torch.randn(3, 17, 32, dtype=torch.float64, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    context = make_context(3, torch.float64)
    out, expected = ours(x1, context), plain(x2, context.pooled)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

    grad = torch.randn_like(out)
    out.backward(grad), expected.backward(grad)
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-11, atol=1e-11)
    with torch.no_grad():  # our gradients, read through the same map as our weights
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
        ours.cve.k_proj_text.zero_(), ours.cve.k_bias.zero_()
    for name, value in ours.public_state_dict().items():
        reference = plain.get_parameter(name).grad
        torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-11, msg=name)


def test_public_state_dict_round_trip() -> None:
    ffn = MLP(ViTConfig(**ARCH))
    one, two = (
        CoMoE(ffn, context_dim=CONTEXT_DIM, num_experts=3, activation="gelu") for _ in range(2)
    )
    randomise(one)
    two.load_public_state_dict(one.public_state_dict())
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    state = one.public_state_dict()
    state.pop("gate.bias")
    with pytest.raises(ValueError, match=r"gate\.bias: expected \(3,\), found None"):
        two.load_public_state_dict(state)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_equal_the_frozen_encoder_at_initialisation(family: str) -> None:
    torch.manual_seed(0)
    tower = VisionTower(backbone=dict(type=family, arch=ARCH)).eval()
    randomise(tower.backbone)
    images = pixels()
    expected = tower(images)
    tuned = VisionTower(backbone=tower.backbone, vft=CoVFT(), context_dim=CONTEXT_DIM).eval()
    assert isinstance(tuned.backbone.blocks[-1].mlp, CoMoE)
    torch.testing.assert_close(tuned(images, make_context(3)), expected, rtol=1e-5, atol=1e-5)


def expected_public_names(blocks: int, first: int, experts: int) -> set[str]:
    names = set()
    for i in range(blocks):
        names |= {f"{i}.layer_norm{k}.{p}" for k in (1, 2) for p in ("weight", "bias")}
        if i < first:
            continue
        for n in range(experts):
            names |= {f"{i}.mlp.experts.{n}.{k}.{p}" for k in (0, 2) for p in ("weight", "bias")}
        for block in ("image_resblock", "text_resblock"):
            names |= {
                f"{i}.mlp.{block}.{part}.{p}"
                for part in ("fc1", "fc2", "ln")
                for p in ("weight", "bias")
            }
        attention = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
        names |= {f"{i}.mlp.cross_attn.{part}" for part in attention}
        names |= {
            f"{i}.mlp.{part}.{p}"
            for part in ("cross_attn.out_proj", "gate")
            for p in ("weight", "bias")
        }
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_trainable_names_are_those_of_the_public_layout(family: str) -> None:
    tower = make_tower(family)
    blocks = tower.backbone.blocks
    first = len(blocks) // 2
    found = set()
    for i, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if name.startswith("norm"):
                assert parameter.requires_grad
                found.add(f"{i}.layer_{name}")
            elif i >= first and name.startswith("mlp."):
                assert parameter.requires_grad, name
            else:
                assert not parameter.requires_grad, name
        if i >= first:
            found |= {f"{i}.mlp.{key}" for key in block.mlp.public_state_dict()}
    assert found == expected_public_names(len(blocks), first, 4)
    outside = [
        name
        for name, parameter in tower.backbone.named_parameters()
        if parameter.requires_grad and not name.startswith("blocks.")
    ]
    assert outside == []


def test_norms_all_adds_the_pre_norm() -> None:
    trainable = {
        name for name, p in make_tower(norms="all").backbone.named_parameters() if p.requires_grad
    }
    default = {name for name, p in make_tower().backbone.named_parameters() if p.requires_grad}
    assert trainable - default == {"pre_norm.weight", "pre_norm.bias"}


def test_a_step_changes_nothing_else() -> None:
    tower = make_tower()
    randomise(tower.backbone.blocks[-1].mlp)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    trainable = {name for name, p in tower.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], lr=1.0)
    tower.train()(pixels(), make_context(3)).square().sum().backward()
    optimizer.step()
    changed = {
        name for name, value in tower.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed <= trainable
    last = f"backbone.blocks.{len(tower.backbone.blocks) - 1}"
    assert {n for n in trainable if n.startswith(f"{last}.mlp")} <= changed


def test_question_changes_the_features_once_experts_differ() -> None:
    tower = make_tower().eval()
    images, one, two = pixels(), make_context(3), make_context(3)
    same = tower(images, one) - tower(images, two)
    assert same.abs().max() < 1e-5
    for block in tower.backbone.blocks[1:]:
        randomise(block.mlp)
    assert (tower(images, one) - tower(images, two)).abs().max() > 1e-2


def test_gradient_checkpointing_gives_equal_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        tower = make_tower().train()
        randomise(tower.backbone.blocks[-1].mlp)
        tower.backbone.checkpointing = checkpointing
        torch.manual_seed(1)
        images, context = pixels(), make_context(3)
        tower(images, context).square().sum().backward()
        grads.append({n: p.grad for n, p in tower.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert torch.equal(grad, grads[1][name]), name


def test_first_block_and_missing_context_are_explained() -> None:
    with pytest.raises(ValueError, match=r"first_block is 9, but the encoder consumes \d blocks"):
        make_tower(first_block=9)
    with pytest.raises(ValueError, match=r"text_encoder"):
        VisionTower(backbone=dict(type="CLIP", arch=ARCH), vft=CoVFT())
    with pytest.raises(ValueError, match="3 images, but context rows for 2"):
        make_tower()(pixels(3), make_context(2))


@pytest.mark.parametrize(("first_block", "public"), [(None, 529.0), (19, 176.4)])
def test_full_size_counts(first_block: int | None, public: float) -> None:
    with torch.device("meta"):
        tower = VisionTower(
            backbone=dict(type="CLIP"), vft=CoVFT(first_block=first_block), context_dim=768
        )
    trained = sum(p.numel() for p in tower.parameters() if p.requires_grad)
    dead = sum(b.numel() for n, b in tower.named_buffers() if "k_proj_text" in n or "k_bias" in n)
    assert (trained + dead) / 1e6 == pytest.approx(public, abs=0.05)
    if first_block is None:
        assert trained / 1e6 == pytest.approx(521.9, abs=0.05)
        assert dead / 1e6 == pytest.approx(7.09, abs=0.005)
