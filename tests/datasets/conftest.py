import numpy as np
import pytest
from PIL import Image
from tokenizers_for_tests import bert_tokenizer, byte_level_tokenizer

from covft.conversation import get_template
from covft.datasets import InputSpec
from covft.models.vision.image_spec import ImageSpec


@pytest.fixture
def spec():
    return InputSpec(
        tokenizer=byte_level_tokenizer(),
        template=get_template("qa"),
        image=ImageSpec(8, (0.5, 0.4, 0.3), (0.5, 0.5, 0.5), "crop"),
        num_image_tokens=4,
        context_tokenizer=bert_tokenizer(),
    )


@pytest.fixture
def image_root(tmp_path):
    """A folder with images a.png, b.png, c.jpg and a truncated broken.jpg."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.jpg"):
        pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    whole = (tmp_path / "c.jpg").read_bytes()
    (tmp_path / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    return tmp_path


@pytest.fixture
def record():
    """Builds an annotation."""

    def build(sample_id, *, image=None, texts=("what color is it?", "blue")):
        turns = [
            {"from": "gpt" if n % 2 else "human", "value": text} for n, text in enumerate(texts)
        ]
        built = {"id": sample_id, "conversations": turns}
        return built if image is None else {**built, "image": image}

    return build
