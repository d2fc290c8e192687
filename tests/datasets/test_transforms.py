import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from covft.datasets import transform
from covft.images import image_size, load_image
from covft.models.vision.image_spec import CLIP_MEAN, CLIP_STD, ImageSpec

SIZES = [(40, 40), (77, 50), (50, 77), (20, 31), (33, 90), (101, 34), (7, 5)]


def noise(width, height):
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def spec_of(resize, size=33):
    return ImageSpec(size, CLIP_MEAN, CLIP_STD, resize)


def processed(image, size=33):
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_rescale=False,
        do_normalize=False,
    )
    return torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize("size", SIZES)
def test_crop_equals_the_clip_processor(size):
    image = noise(*size)
    pixels = transform(image, spec_of("crop"))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 33, 33)
    assert torch.equal(pixels, processed(image).to(torch.uint8))


@pytest.mark.parametrize("size", SIZES)
def test_pad_equals_the_clip_processor_on_a_padded_image(size):
    image = noise(*size)
    width, height = size
    side = max(size)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = [122, 116, 104]  # LLaVA's colour for CLIP
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = np.array(image)
    expected = processed(Image.fromarray(square)).to(torch.uint8)
    assert torch.equal(transform(image, spec_of("pad")), expected)


def test_stretch_keeps_the_whole_image():
    image = Image.new("RGB", (64, 16), (0, 0, 0))
    image.paste((255, 255, 255), (32, 0, 64, 16))
    pixels = transform(image, spec_of("stretch", 16))
    assert pixels[:, :, :6].max() == 0
    assert pixels[:, :, 10:].min() == 255


def test_resize_overrides_the_encoders_way():
    image = noise(50, 30)
    assert torch.equal(
        transform(image, spec_of("crop"), resize="pad"), transform(image, spec_of("pad"))
    )
    with pytest.raises(ValueError, match="crop, stretch, pad, got 'squash'"):
        transform(image, spec_of("crop"), resize="squash")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    noise(9, 6).convert(mode).save(tmp_path / "image.png")
    image = load_image(tmp_path / "image.png")
    assert image.mode == "RGB"
    assert image.size == (9, 6)


def test_files_that_cannot_be_read_are_named(image_root):
    (image_root / "text.png").write_text("not an image")
    (image_root / "empty.png").touch()
    whole = (image_root / "a.png").read_bytes()
    (image_root / "half.png").write_bytes(whole[: len(whole) // 2])
    (image_root / "head.png").write_bytes(whole[:20])
    (image_root / "flipped.png").write_bytes(whole[:60] + b"\xff\x00\xff" + whole[63:])
    (image_root / "folder.png").mkdir()
    for name in (
        "text.png",
        "empty.png",
        "half.png",
        "head.png",
        "flipped.png",
        "broken.jpg",
        "folder.png",
    ):
        with pytest.raises(ValueError, match=rf"can't be read: .*{name}"):
            load_image(image_root / name)
    with pytest.raises(ValueError, match=r"not found: .*none.png"):
        load_image(image_root / "none.png")


def test_huge_images_are_named(tmp_path, monkeypatch):
    noise(30, 30).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"too large: .*huge.png"):
        load_image(tmp_path / "huge.png")


@pytest.mark.parametrize("size", [*SIZES, (33, 20), (640, 480), (480, 640), (34, 1), (1, 34)])
def test_padding_after_the_width_is_resized_changes_no_pixel(size):
    image = noise(*size)
    width, height = size
    side = max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    expected = np.array(square.resize((33, 33), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert (transform(image, spec_of("pad")).numpy() == expected).all()


def test_an_images_size_is_read_from_its_header(image_root):
    assert image_size(image_root / "a.png") == (16, 12)
    whole = (image_root / "c.jpg").read_bytes()
    (image_root / "cut.jpg").write_bytes(whole[:-20])
    assert image_size(image_root / "cut.jpg") == (16, 12)
    with pytest.raises(ValueError, match=r"not found: .*none.png"):
        image_size(image_root / "none.png")
