import numpy as np
import pytest

from covft.datasets import InstructDataset, transform
from covft.datasets.browse import ERROR, IMAGE_TAG, SUPERVISED, draw_sample
from covft.images import load_image


def area(picture, color):
    return int((picture == color).all(axis=-1).sum())


@pytest.fixture
def draw(spec, image_root):
    def drawn(record):
        dataset = InstructDataset([record], spec=spec, image_root=str(image_root))
        return draw_sample(dataset, 0)

    return drawn


def test_pixels_are_the_models(draw, record, image_root, spec):
    picture = draw(record("x", image="a.png"))
    assert picture.dtype == np.uint8
    pixels = transform(load_image(image_root / "a.png"), spec.image).permute(1, 2, 0).numpy()
    # 8 pixels are drawn as 224: each is a square of 28, in BGR.
    assert np.array_equal(picture[14:224:28, 14:224:28, ::-1], pixels)


def test_several_images_are_drawn_below_each_other(draw, record):
    assert draw(record("x", image=["a.png", "b.png"])).shape[0] == 448


def test_supervised_text_is_highlighted(draw, record):
    short = draw(record("x", texts=("what?", "no")))
    long = draw(record("x", texts=("what?", "no, there isn't any")))
    more_asked = draw(record("x", texts=("what is in there, if anything?", "no")))
    assert 0 < area(short, SUPERVISED) < area(long, SUPERVISED)
    assert area(more_asked, SUPERVISED) == area(short, SUPERVISED)
    assert area(short, IMAGE_TAG) == 0
    assert area(draw(record("x", image="a.png")), IMAGE_TAG) > 0


def test_long_text_stays_on_the_paper(draw, record):
    for text in ("word " * 120, "图" * 300, "x" * 400, "line\n" * 20):
        picture = draw(record("x", texts=("what?", text)))
        assert picture.shape[0] > 120
        assert (picture[:, -8:] == 255).all()
        assert (picture[-8:] == 255).all()


def test_a_sample_that_cannot_be_used_shows_why(draw, record):
    assert area(draw(record("x", image="none.png")), ERROR) > 0
