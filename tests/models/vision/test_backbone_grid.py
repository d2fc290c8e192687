import pytest

from covft.models.vision import DINOv2, SigLIP


@pytest.mark.parametrize(("family", "size"), [(DINOv2, 112), (SigLIP, 128)])
def test_grid_sets_the_image_size(family: type, size: int) -> None:
    arch = dict(hidden_dim=32, depth=2, num_heads=4, mlp_dim=64)
    encoder = family(arch=arch, grid=8)
    assert encoder.image_spec.image_size == size
    assert encoder.num_tokens == 64


def test_grid_and_image_size_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        DINOv2(grid=8, image_size=112)
