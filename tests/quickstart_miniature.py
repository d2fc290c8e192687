"""The quickstart at its smallest: six images, random weights, small tokenizers."""

import json

import numpy as np
import torch
from miniature import ARCH
from PIL import Image
from tokenizers_for_tests import bert_tokenizer, byte_level_tokenizer

from covft.checkpoints import build_model
from covft.config import load_config, stage_configs

QUESTIONS = [
    ("what color is the shape?", "{color}"),
    ("what shape is in the image?", "{shape}"),
    ("is there a red shape?", "yes"),
    ("is there not a circle?", "no"),
]


def write_easy_vqa(root):
    """Write six images and 24 questions in each split, in the official format."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (root / split / "images").mkdir(parents=True)
        rows = []
        for image in range(6):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / "images" / f"{image}.png")
            words = dict(color=["red", "blue"][image % 2], shape=["circle", "triangle"][image // 3])
            rows += [[question, answer.format(**words), image] for question, answer in QUESTIONS]
        (root / split / "questions.json").write_text(json.dumps(rows))
    return root


def tiny_quickstart(tokenizer_folders, easy_vqa_root):
    """Return what shrinks configs/quickstart_*.py to random weights and six images."""
    root = str(easy_vqa_root)
    vocabulary = len(byte_level_tokenizer())
    llm = dict(
        model_type="llama",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    text = dict(
        model_type="bert",
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=len(bert_tokenizer()),
    )
    return {
        "model.vision.backbone.weights": None,
        "model.vision.backbone.arch": ARCH,
        "model.vision.backbone.select_layer": -1,
        "model.vision.backbone.grid": 4,
        "model.llm.weights": None,
        "model.llm.arch": llm,
        "model.llm.tokenizer": str(tokenizer_folders / "llm"),
        "model.text_encoder.weights": None,
        "model.text_encoder.arch": text,
        "model.text_encoder.tokenizer": str(tokenizer_folders / "text"),
        "train_dataset.root": root,
        "stages.pretrain.train_dataset.root": root,
        "evaluation.benchmark.root": root,
        "evaluation.benchmark.limit": 10,
        "train_cfg.max_iters": 3,
        "stages.pretrain.train_cfg.max_iters": 3,
        "train_dataloader.batch_size": 2,
        "stages.pretrain.train_dataloader.batch_size": 2,
        "checkpoint.interval": 2,
    }


def noisy_model(options, method="covft"):
    """Build the quickstart's MLLM with the options; no parameter is at a special value."""
    torch.manual_seed(0)
    model = build_model(stage_configs(load_config(f"quickstart_{method}", options))[-1][1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
