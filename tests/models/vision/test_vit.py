"""The ViT itself: selected layer, checkpointing, DropPath, context."""

import dataclasses

import pytest
import torch
from torch import nn

from covft.models.checkpointing import RUN
from covft.models.vision import Block, DropPath, ViT, ViTConfig
from covft.models.vision.vit import activation

CONFIG = ViTConfig(
    image_size=32, patch_size=8, hidden_dim=32, depth=3, num_heads=4, mlp_dim=64, layer_scale=0.5
)


def _vit(seed=0, changes=None, **options):
    torch.manual_seed(seed)
    return ViT(dataclasses.replace(CONFIG, **(changes or {})), **options)


@pytest.mark.parametrize(("select_layer", "blocks"), [(-1, 3), (-2, 2), (-3, 1), (1, 1), (3, 3)])
def test_blocks_after_the_selected_layer_are_not_built(select_layer, blocks, pixels):
    vit = _vit(select_layer=select_layer)
    assert len(vit.blocks) == vit.select_layer == blocks
    vit(pixels).sum().backward()
    assert all(parameter.grad is not None for parameter in vit.parameters())


@pytest.mark.parametrize("select_layer", [0, 4, -4])
def test_a_layer_that_does_not_exist(select_layer):
    with pytest.raises(ValueError, match=rf"select_layer={select_layer} .* 3 blocks"):
        _vit(select_layer=select_layer)


def test_final_norm_only_after_the_last_block():
    with pytest.raises(ValueError, match="final_norm=True belongs to the last of 3 blocks"):
        _vit(select_layer=-2, final_norm=True)
    assert isinstance(_vit(final_norm=True).final_norm, nn.LayerNorm)
    assert not any("final_norm" in name for name in _vit().state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act": "gelu_tan"}, "did you mean 'gelu_tanh'"),
        ({"pos_embed": "sine"}, "'learned' or 'rope'"),
        ({"pos_embed": "rope", "num_heads": 16}, "multiple of 4, got 2"),
        ({"patch_size": 64}, "smaller than patch_size"),
        ({"drop_path": 1.0}, "drop_path must be in"),
    ],
)
def test_impossible_architectures(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_activation_names():
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(activation("quick_gelu")(x), x / (1 + (-1.702 * x).exp()))
    assert not torch.equal(activation("gelu")(x), activation("gelu_tanh")(x))


def test_prefix_tokens_are_dropped_and_patches_keep_their_order():
    vit = _vit(changes={"num_registers": 2}, select_layer=1)
    nn.init.zeros_(vit.pos_embed)
    vit.blocks = nn.ModuleList()  # the embedding alone
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[:, :, 8:16, 24:32] = 1  # row 1, column 3 of the 4 x 4 grid
    out = vit(pixels)
    assert vit.num_prefix == 3
    assert out.shape == (1, 16, 32)
    assert out.abs().sum(-1).nonzero()[:, 1].tolist() == [7]
    tokens = vit.embed(pixels)
    assert torch.equal(tokens[:, :1], vit.cls_token)
    assert torch.equal(tokens[:, 1:3], vit.register_tokens)


class _ContextMLP(nn.Module):
    """An MLP that adds its image's context: what a fine-tuning method may put in a block."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x, context):
        return self.mlp(x, context) + context["text"][:, None]


def _step(vit, pixels, context):
    vit.zero_grad()
    context = {"text": context.clone().requires_grad_()}
    torch.manual_seed(3)
    out = vit(pixels, context)
    out.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in vit.named_parameters()}
    return out.detach(), {**gradients, "context": context["text"].grad}


@pytest.mark.parametrize("pos_embed", ["learned", "rope"])
def test_checkpointing_changes_nothing_drop_path_included(pos_embed, monkeypatch):
    vit = _vit(changes={"drop_path": 0.5, "pos_embed": pos_embed}).train()
    vit.blocks[1].mlp = _ContextMLP(vit.blocks[1].mlp)
    pixels, context = torch.randn(8, 3, 32, 32), torch.randn(8, 32)
    calls = []
    run = Block.run
    monkeypatch.setattr(Block, "run", lambda *a, **k: calls.append(1) or run(*a, **k))

    plain, plain_gradients = _step(vit, pixels, context)
    assert len(calls) == 3
    vit.checkpointing = True
    recomputed, recomputed_gradients = _step(vit, pixels, context)
    assert len(calls) == 3 + 6  # each block ran again in the backward pass
    assert torch.equal(plain, recomputed)
    for name, gradient in plain_gradients.items():
        assert torch.equal(gradient, recomputed_gradients[name]), name
    reached = plain_gradients["context"].abs().sum(1) > 0
    assert 0 < reached.sum() < 8  # DropPath cut off some of the images


def test_checkpointing_only_in_training_with_gradients(monkeypatch, pixels):
    vit = _vit(checkpointing=True)
    monkeypatch.delitem(RUN, "full")  # would fail if called
    vit.eval()(pixels)
    with torch.no_grad():
        vit.train()(pixels)
    with pytest.raises(KeyError):
        vit(pixels)


def test_checkpointing_starves_no_gradient_behind_frozen_blocks(pixels):
    vit = _vit(checkpointing=True).train().requires_grad_(False)
    vit.blocks[1].mlp.fc1.weight.requires_grad_(True)
    vit(pixels).sum().backward()
    assert vit.blocks[1].mlp.fc1.weight.grad.abs().sum() > 0


class _RegisterAdder(nn.Module):
    """A wrapper that prepends a token on the way in or drops it on the way out."""

    def __init__(self, block, *, drop):
        super().__init__()
        self.block, self.drop = block, drop

    def forward(self, x, context, rope=None):
        if self.drop:
            return self.block(x, context, rope)[:, 1:]
        extra = context["text"][:, None]
        return self.block(torch.cat((extra, x), dim=1), context, rope)


@pytest.mark.parametrize("pos_embed", ["learned", "rope"])
@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_blocks_in_two_parts_equal_the_whole(pos_embed, stop, pixels):
    vit = _vit(changes={"pos_embed": pos_embed}, final_norm=True).eval()
    vit.blocks[0] = _RegisterAdder(vit.blocks[0], drop=False)
    vit.blocks[2] = _RegisterAdder(vit.blocks[2], drop=True)
    context = {"text": torch.randn(2, 32)}
    tokens = vit.run_blocks(vit.embed(pixels), context, stop=stop)
    assert tokens.shape == (2, 17 + (stop in (1, 2)), 32)
    found = vit.output(vit.run_blocks(tokens, context, start=stop))
    assert torch.equal(found, vit(pixels, context))


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    out = drop.train()(x)
    per_image = out.flatten(1)
    assert torch.equal(per_image.amin(1), per_image.amax(1))
    torch.testing.assert_close(per_image[:, 0].unique(), torch.tensor([0, 4 / 3]))
    assert out.mean() == pytest.approx(1, abs=0.03)
    assert drop.eval()(x) is x


def test_drop_path_grows_with_depth_of_the_published_encoder():
    vit = _vit(changes={"drop_path": 0.2}, select_layer=-2)
    assert isinstance(vit.blocks[0].drop_path, nn.Identity)
    assert vit.blocks[1].drop_path.rate == pytest.approx(0.1)
    assert not any(isinstance(m, DropPath) for m in _vit().modules())


def test_rope_survives_meta_and_inference_mode(pixels):
    changes = {"pos_embed": "rope"}
    expected = _vit(changes=changes)
    with torch.device("meta"):
        vit = ViT(dataclasses.replace(CONFIG, **changes))
    vit.to_empty(device="cpu")
    vit.load_state_dict(expected.state_dict())
    with torch.inference_mode():
        first = vit(pixels)
    out = vit(pixels)
    out.sum().backward()
    assert torch.equal(out, first)
    assert torch.equal(out, expected(pixels))
