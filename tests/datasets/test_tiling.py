import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers_for_tests import llama_tokenizer, phi3_tokenizer
from transformers import GotOcr2ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from covft.conversation import IMAGE_TOKEN_ID, get_template
from covft.datasets import Collator, InputSpec, InstructDataset, Tiles, tiled
from covft.datasets.prompts import Prompt, collate_prompts
from covft.datasets.tiling import checked_resizing, num_squares, squares, tile_grid

SIZE = 12  # of a tile, where pixels are compared


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def processor(max_tiles: int) -> GotOcr2ImageProcessorPil:
    return GotOcr2ImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        crop_to_patches=True,
        max_patches=max_tiles,
        do_rescale=False,
        do_normalize=False,
    )


@pytest.mark.parametrize("max_tiles", [1, 6, 12])
def test_grids_are_those_of_the_public_processor(max_tiles: int) -> None:
    sizes = np.random.default_rng(max_tiles).integers(8, 2500, (1000, 2)).tolist()
    # Ties, at areas on both sides of the border: 1.25 lies between 1, 1.5 and 2 x 2.
    ties = [(5 * n, 4 * n) for n in range(1, 400, 7)] + [(3 * n, 4 * n) for n in range(1, 400, 7)]
    found = set()
    for width, height in sizes + ties + [(448 * n, 448 * n) for n in (1, 2, 3)]:
        ours = tile_grid(width, height, tile_size=448, max_tiles=max_tiles)
        theirs = get_optimal_tiled_canvas((height, width), (448, 448), 1, max_tiles)
        assert ours == theirs, (width, height)
        count = processor(max_tiles).get_number_of_image_patches(
            height, width, {"patch_size": {"height": 448, "width": 448}}
        )
        assert num_squares(width, height, tile_size=448, max_tiles=max_tiles) == count
        found.add(ours)
    assert len(found) > max_tiles // 2


def test_pixels_are_those_of_the_public_processor() -> None:
    processors = {max_tiles: processor(max_tiles) for max_tiles in (1, 6, 12)}
    sizes = np.random.default_rng(0).integers(4, 90, (1000, 2)).tolist()
    counts = set()
    for number, (width, height) in enumerate(sizes):
        max_tiles = (1, 6, 12)[number % 3]
        image = noise(width, height)
        ours = tiled(image, tile_size=SIZE, max_tiles=max_tiles)
        theirs = processors[max_tiles](image)["pixel_values"]
        assert ours.dtype == torch.uint8 and ours.is_contiguous()
        assert np.array_equal(ours.numpy(), np.stack(theirs)), (width, height, max_tiles)
        counts.add(len(ours))
    assert {1, 3, 7, 13} < counts


def test_a_photo_of_640_by_480_has_seven_tiles() -> None:
    assert tile_grid(640, 480, tile_size=448, max_tiles=6) == (3, 2)
    assert num_squares(640, 480, tile_size=448, max_tiles=6) * 256 == 1792


def test_order_is_rows_then_the_thumbnail() -> None:
    image = Image.new("RGB", (6, 4))
    image.putdata([(x // 2 * 10, y // 2 * 10, 0) for y in range(4) for x in range(6)])
    tiles = tiled(image, tile_size=2, max_tiles=6)
    assert tiles[:6, :2, 0, 0].tolist() == [[0, 0], [10, 0], [20, 0], [0, 10], [10, 10], [20, 10]]
    assert len(tiles) == 7 and tiles[6].float().var() > 0


def test_images_of_a_sample_share_the_tiles(spec) -> None:
    wide = noise(80, 20)
    for count, each in ((1, 5), (2, 4), (3, 3), (6, 1), (9, 1)):
        pixels = squares([wide] * count, spec.image, resize=Tiles(6))
        assert [len(rows) for rows in pixels] == [each] * count, count
    assert len(squares([wide], spec.image, resize=None)[0]) == 1
    assert squares([], spec.image, resize=Tiles(6)) == []


@pytest.mark.parametrize(
    ("resize", "max_tiles", "message"),
    [
        ("tiles", None, "needs max_tiles, 6 in InternVL2"),
        ("pad", 6, "max_tiles=6 has no effect with resize='pad'"),
        (None, 6, "max_tiles=6 has no effect with resize=None"),
        ("tiles", 0, "positive whole number, got 0"),
        ("tiles", 2.5, "positive whole number, got 2.5"),
        ("tile", None, "one of crop, stretch, pad, tiles, got 'tile'"),
    ],
)
def test_wrong_options(spec, record, resize, max_tiles, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_resizing(resize, max_tiles)
    with pytest.raises(ValueError, match=message):
        InstructDataset([record("x")], spec=spec, resize=resize, max_tiles=max_tiles)


def test_a_dataset_of_tiles(spec, image_root, record) -> None:
    records = [
        record("one", image="a.png"),
        record("two", image=["a.png", "b.png"]),
        record("text"),
    ]
    arguments = dict(spec=spec, image_root=str(image_root), on_bad="raise")
    dataset = InstructDataset(records, resize="tiles", max_tiles=6, **arguments)
    assert dataset.resize == Tiles(6)
    # 16 x 12 pixels: 3 x 2 tiles and a thumbnail; two of them have 3 tiles each, which makes 1 x 1.
    assert [len(dataset[i].pixel_values) for i in range(3)] == [7, 2, 0]
    batch = Collator(spec)([dataset[i] for i in range(3)])
    assert batch["image_to_sample"].tolist() == [0] * 7 + [1] * 2
    assert (batch["input_ids"] == IMAGE_TOKEN_ID).sum(1).tolist() == [28, 8, 0]
    assert batch["pixel_values"].shape == (9, 3, 8, 8)


def test_prompts_have_the_tiles_of_training(spec, image_root, record) -> None:
    path = image_root / "a.png"
    dataset = InstructDataset(
        [record("x", image=str(path))], spec=spec, resize="tiles", max_tiles=6
    )
    turns = [{"from": "human", "value": "<image>\nwhat color is it?"}]
    prompt = Prompt("x", turns, [Image.open(path).convert("RGB")])
    batch = collate_prompts([prompt], spec, resize=dataset.resize)
    assert torch.equal(batch["pixel_values"], dataset[0].pixel_values)
    length = batch["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][0], dataset[0].input_ids[:length])
    with pytest.raises(ValueError, match=r"give resize=Tiles\(6\)"):
        collate_prompts([prompt], spec, resize="tiles")


def test_lengths_count_tiles_as_stated_or_bound_them(spec, record) -> None:
    sized = [
        record("exact", image="a.png") | {"width": 640, "height": 480},
        record("flat", image="a.png") | {"width": 90, "height": 90},
        record("list", image=["a.png"] * 2) | {"width_list": [40, 9], "height_list": [20, 9]},
        record("unknown", image="a.png"),
        record("wrong", image="a.png") | {"width": 0, "height": 9},
        record("too few", image=["a.png"] * 2) | {"width": 40, "height": 20},
        record("text"),
    ]
    dataset = InstructDataset(sized, spec=spec, resize="tiles", max_tiles=6)
    text = dataset.lengths()[-1]
    tokens = [(length - text) / spec.num_image_tokens for length in dataset.lengths()]
    assert tokens == [7, 5, 4, 7, 7, 8, 0]
    plain = InstructDataset(sized, spec=spec)
    assert [(n - text) / spec.num_image_tokens for n in plain.lengths()] == [1, 1, 2, 1, 1, 2, 0]


@pytest.fixture
def phi3_spec(spec) -> InputSpec:
    return dataclasses.replace(spec, tokenizer=phi3_tokenizer(), template=get_template("phi3-chat"))


def test_one_pair_of_marks_stands_around_all_tiles(phi3_spec, image_root, record) -> None:
    records = [record("x", image=["a.png", "b.png"], texts=("<image> or <image>?", "no"))]
    dataset = InstructDataset(
        records, spec=phi3_spec, image_root=str(image_root), resize="tiles", max_tiles=12
    )
    sample, tokenizer = dataset[0], phi3_spec.tokenizer
    assert len(sample.pixel_values) == 14
    start, end = tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
    ids = [i for i in sample.input_ids.tolist() if i in (start, end, IMAGE_TOKEN_ID)]
    assert ids == ([start] + [IMAGE_TOKEN_ID] * 7 * phi3_spec.num_image_tokens + [end]) * 2


def test_a_tokenizer_without_the_marks_is_refused(phi3_spec) -> None:
    plain = llama_tokenizer()
    message = r"writes <img>, </img>, which this .* 'OpenGVLab/InternVL2-4B' .* add_tokens"
    template = dataclasses.replace(phi3_spec.template, terminator="</s>")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(phi3_spec, tokenizer=plain, template=template)
    without = get_template("v1")
    assert dataclasses.replace(phi3_spec, tokenizer=plain, template=without).template is without
