"""Tokens kept over several questions: equality, what is computed, memory, staleness."""

import pytest
import torch
from miniature import ARCH
from torch import Tensor, nn

from covft.models.text_encoder import Context
from covft.models.vision import VisionTower
from covft.models.vision.feature_cache import FeatureCache
from covft.vft.base import VFTMethod
from covft.vft.covft import CoVFT
from covft.vft.inference import inference_routing
from covft.vft.plain import Freeze, Full

FAMILIES = ["CLIP", "SigLIP", "DINOv2", "DINOv3", "InternViT"]
CONTEXT_DIM = 24


def make_tower(vft=None, family="CLIP", dtype=torch.float32, **options) -> VisionTower:
    torch.manual_seed(0)
    arch = {**ARCH, "depth": 4}
    tower = VisionTower(
        backbone=dict(type=family, arch=arch, select_layer=-1),
        vft=vft or CoVFT(),
        context_dim=CONTEXT_DIM,
        **options,
    )
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return tower.to(dtype).eval()


def make_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)


def make_context(count: int, dtype=torch.float32) -> Context:
    tokens = torch.randn(count, 5, CONTEXT_DIM, dtype=dtype)
    return Context(tokens[:, 0], tokens, torch.ones(count, 5, dtype=torch.bool))


def image_counts(block: nn.Module) -> list[int]:
    """Return a list that grows by the number of images of each call of the block."""
    counts: list[int] = []
    block.register_forward_hook(lambda _module, args, _output: counts.append(len(args[0])))
    return counts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [CoVFT, Freeze, Full])
@torch.no_grad()
def test_equals_the_uncached_tower(family: str, method: type[VFTMethod]) -> None:
    tower = make_tower(method(), family, torch.float64)
    cache, images = FeatureCache(), make_images(4)
    for rows in ([0, 1, 0, 2], [1, 3], [3], [2, 1, 0, 3, 3]):
        context = make_context(len(rows), torch.float64)
        expected = tower(images[rows], context)
        found = tower(images[rows], context, cache=cache)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_equal_to_the_bit_where_the_batch_is_the_same() -> None:
    tower, cache, images = make_tower(), FeatureCache(), make_images(3)
    for _question in range(3):
        context = make_context(3)
        assert torch.equal(tower(images, context, cache=cache), tower(images, context))


@torch.no_grad()
def test_each_image_passes_the_context_free_blocks_once() -> None:
    tower, cache, images = make_tower(), FeatureCache(), make_images(4)
    first, reading = (image_counts(tower.backbone.blocks[i]) for i in (1, 2))
    tower(images[[0, 1, 0, 2]], make_context(4), cache=cache)
    assert (first, reading) == ([3], [4])
    tower(images[[2, 0]], make_context(2), cache=cache)
    assert (first, reading) == ([3], [4, 2])
    tower(images[[3, 1]], make_context(2), cache=cache)
    assert (first, reading) == ([3, 1], [4, 2, 2])
    assert (cache.num_misses, cache.num_hits, len(cache)) == (4, 4, 4)


@pytest.mark.parametrize("method", [Freeze, Full])
@torch.no_grad()
def test_methods_without_text_cache_the_whole_encoder(method: type[VFTMethod]) -> None:
    tower, cache, images = make_tower(method()), FeatureCache(), make_images(2)
    counts = [image_counts(block) for block in tower.backbone.blocks]
    features = [tower(images, cache=cache) for _question in range(3)]
    assert counts == [[2]] * 4
    assert torch.equal(features[0], features[2])


@torch.no_grad()
def test_the_question_changes_the_features_of_a_cached_image() -> None:
    tower, cache, images = make_tower(), FeatureCache(), make_images(2)
    one, two = (tower(images, make_context(2), cache=cache) for _question in range(2))
    assert cache.num_hits == 2
    assert (one - two).flatten(1).abs().amax(1).min() > 1e-2


@torch.no_grad()
def test_equal_pixels_share_and_other_types_do_not() -> None:
    tower, cache, images = make_tower(Freeze()), FeatureCache(), make_images(1)
    expected = tower(images)
    assert torch.equal(tower(images.repeat(2, 1, 1, 1), cache=cache)[1:], expected)
    assert torch.equal(tower(images.clone(), cache=cache), expected)
    assert (len(cache), cache.num_misses) == (1, 1)
    halves = (images / 255).half()
    for floats in (halves, halves.view(torch.bfloat16)):  # the same bytes
        assert torch.equal(tower(floats, cache=cache), tower(floats))
    other = images.clone()
    other[0, 2, 31, 31] ^= 1
    assert torch.equal(tower(other, cache=cache), tower(other))
    assert len(cache) == 4


@torch.no_grad()
def test_the_least_recently_used_image_goes_and_memory_stays_bounded() -> None:
    tower, images = make_tower(), make_images(5)
    cache = FeatureCache(max_bytes=2 * tower.cached_bytes + 7)
    computed = image_counts(tower.backbone.blocks[0])
    for image in (0, 1, 0, 2):  # 2 displaces 1
        tower(images[[image]], make_context(1), cache=cache)
    assert sum(computed) == 3
    tower(images[[0, 2]], make_context(2), cache=cache)
    assert sum(computed) == 3
    tower(images[[1]], make_context(1), cache=cache)
    assert sum(computed) == 4

    context = make_context(6)
    rows = images[[0, 1, 2, 3, 4, 1]]
    torch.testing.assert_close(tower(rows, context, cache=cache), tower(rows, context))
    assert len(cache) == 2
    assert cache.num_bytes == 2 * tower.cached_bytes == 2 * 17 * 32 * 4
    # No row keeps its whole batch alive.
    assert sum(row.untyped_storage().nbytes() for row in cache._rows.values()) == cache.num_bytes


@torch.no_grad()
def test_bounds_that_hold_nothing_are_explained() -> None:
    with pytest.raises(ValueError, match="max_bytes of at least 1, got 0"):
        FeatureCache(max_bytes=0)
    tower = make_tower()
    cache = FeatureCache(max_bytes=tower.cached_bytes - 1)
    with pytest.raises(ValueError, match=r"take 2176 bytes, more than .* max_bytes \(2175\)"):
        tower(make_images(1), make_context(1), cache=cache)


def test_refused_in_training_and_with_gradients() -> None:
    tower, cache = make_tower(), FeatureCache()
    arguments = make_images(1), make_context(1)
    with pytest.raises(ValueError, match="a feature cache is for inference"):
        tower(*arguments, cache=cache)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
            tower.train()(*arguments, cache=cache)
        tower.eval()(*arguments, cache=cache)
    with torch.inference_mode():
        kept = tower(*arguments, cache=cache)
    assert torch.equal(kept, tower(*arguments).detach())


def test_other_weights_empty_the_cache() -> None:
    tower, cache, images = make_tower(Full()), FeatureCache(), make_images(2)
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    for _step in range(2):
        with torch.no_grad():
            assert torch.equal(tower(images, cache=cache), tower(images))
        tower.train()(images).square().mean().backward()
        optimizer.step()
        tower.eval()
    with torch.no_grad():
        tower.load_state_dict(make_tower(Full()).state_dict())
        assert torch.equal(tower(images, cache=cache), tower(images))
        tower.double()
        assert torch.equal(tower(images, cache=cache), tower(images))
        other = make_tower(Full(), "SigLIP")
        assert torch.equal(other(images, cache=cache), other(images))
    assert (len(cache), cache.num_misses, cache.num_bytes) == (2, 10, 2 * other.cached_bytes)


@torch.no_grad()
def test_an_empty_batch() -> None:
    tower, cache = make_tower(), FeatureCache()
    out = tower(make_images(0), make_context(0), cache=cache)
    assert out.shape == (0, 16, 32) and len(cache) == 0


@torch.no_grad()
def test_pixels_of_another_shape_are_explained_with_a_cache_too() -> None:
    with pytest.raises(ValueError, match=r"\(images, 3, 32, 32\), got \(2, 3, 24, 24\)"):
        make_tower()(torch.zeros(2, 3, 24, 24), make_context(2), cache=FeatureCache())


@torch.no_grad()
def test_a_method_that_miscounts_its_context_free_blocks_fails() -> None:
    class Miscounting(CoVFT):
        def context_free_blocks(self, backbone):
            return 3

    with pytest.raises(ValueError, match="context"):
        make_tower(Miscounting())(make_images(1), make_context(1), cache=FeatureCache())


class TextConnector(nn.Module):
    def forward(self, features, context):
        return features + context.pooled[:, None, :1]


class Connected(Freeze):
    needs_context = True

    def apply(self, tower):
        super().apply(tower)
        return TextConnector()

    def context_free_blocks(self, backbone):
        return len(backbone.blocks)


@torch.no_grad()
def test_a_connector_reads_each_question() -> None:
    tower, cache, images = make_tower(Connected()), FeatureCache(), make_images(2)
    computed = image_counts(tower.backbone.blocks[-1])
    one, two = make_context(2), make_context(2)
    expected = tower(images, one), tower(images, two)
    found = tower(images, one, cache=cache), tower(images, two, cache=cache)
    assert computed == [2, 2, 2]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_autocast_tokens_take_what_was_announced() -> None:
    tower, cache, images = make_tower(family="DINOv3"), FeatureCache(), make_images(2)
    context = make_context(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _question in range(2):
            assert torch.equal(tower(images, context, cache=cache), tower(images, context))
    assert cache.num_bytes == 2 * tower.cached_bytes


@pytest.mark.parametrize("options", [dict(context="image-only"), dict(routing="uniform")])
@torch.no_grad()
def test_another_routing_at_inference_empties_the_cache_where_layers_are_cached(options) -> None:
    tower, cache, images = make_tower(CoVFT(**options)), FeatureCache(), make_images(2)
    plain = tower(images, cache=cache)
    gates = {3: torch.tensor([[0.7, 0.1, 0.1, 0.1]])}
    seen = [plain]
    for routing in (dict(top_k=1), dict(gates=gates), dict(gates={3: gates[3].flip(1)})):
        with inference_routing(tower, **routing):
            expected = tower(images)
            for _question in range(2):
                assert torch.equal(tower(images, cache=cache), expected)
        assert all((expected - other).abs().max() > 1e-3 for other in seen)
        seen.append(expected)
    assert torch.equal(tower(images, cache=cache), plain)
    assert (cache.num_misses, cache.num_hits) == (10, 6)


@torch.no_grad()
def test_another_routing_keeps_what_comes_before_the_layers_that_read_text() -> None:
    tower, cache, images = make_tower(), FeatureCache(), make_images(2)
    context = make_context(2)
    tower(images, context, cache=cache)
    with inference_routing(tower, top_k=1):
        assert torch.equal(tower(images, context, cache=cache), tower(images, context))
    assert (cache.num_misses, cache.num_hits) == (2, 2)


@torch.no_grad()
def test_another_autocast_type_empties_the_cache() -> None:
    tower, cache, images = make_tower(Freeze()), FeatureCache(), make_images(2)
    for dtype in (torch.bfloat16, None, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            expected = tower(images)
            for _question in range(2):
                assert torch.equal(tower(images, cache=cache), expected)
    assert (cache.num_misses, cache.num_hits) == (8, 8)
