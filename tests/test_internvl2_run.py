"""configs/internvl2_covft.py, shrunk to random weights: training, resuming, loading, asking."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers_for_tests import bert_tokenizer, phi3_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from covft.chat import ChatSession
from covft.checkpoints import load_run
from covft.checkpoints.export import export_run
from covft.conversation import IMAGE_TOKEN_ID
from covft.datasets import Tiles
from covft.engine.scalars_hook import ScalarsHook, read_scalars
from covft.evaluation import Benchmark, Item
from covft.evaluation.evaluate import evaluate

TOOL = Path(__file__).parent.parent / "tools" / "train.py"
STAGES = ("pretrain", "finetune")
#: Pixels, and the squares that six tiles at most make of them: 3 x 2, 2 x 1 or 1.
IMAGES = {"photo": ((64, 48), 7), "banner": ((80, 40), 3), "stamp": ((30, 30), 1)}


@pytest.fixture
def options(tmp_path) -> list[str]:
    """Published-looking folders and data, and the command line that puts them in place."""
    _write_phi3(tmp_path / "phi3")
    bert_tokenizer().save_pretrained(tmp_path / "text")
    _write_data(tmp_path / "data")
    vision = dict(hidden_dim=32, depth=4, num_heads=4, mlp_dim=64, patch_size=8, image_size=32)
    text = dict(
        model_type="bert",
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=200,
    )
    values = {
        "model.vision.backbone.weights": None,
        **{f"model.vision.backbone.arch.{key}": value for key, value in vision.items()},
        "model.llm.arch": None,
        "model.llm.weights": tmp_path / "phi3",
        "model.llm.tokenizer": tmp_path / "phi3",
        "model.text_encoder.weights": None,
        **{f"model.text_encoder.arch.{key}": value for key, value in text.items()},
        "model.text_encoder.tokenizer": tmp_path / "text",
        "train_dataset.on_bad": "raise",
        "stages.pretrain.train_dataset.on_bad": "raise",
        "checkpoint.interval": 2,
        "train_cfg.accumulation": 2,
    }
    for stage in ("", "stages.pretrain."):
        values[f"{stage}train_dataloader.batch_size"] = 1 if not stage else 2
        values[f"{stage}train_dataloader.num_workers"] = 0
    return [f"{key}={value}" for key, value in values.items()]


def _write_phi3(folder: Path) -> None:
    """Write an LLM as Phi-3's first release: the rope is called "su"."""
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    fields = dict(
        model_type="phi3",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=420,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(**fields, rope_scaling={"rope_type": "longrope", **factors})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    phi3_tokenizer().save_pretrained(folder)
    published = {**fields, "rope_scaling": {"type": "su", **factors}}
    (folder / "config.json").write_text(json.dumps(published))


def _write_data(root: Path) -> None:
    """Write samples for each stage in LLaVA's files: one image, two, none."""
    rng = np.random.default_rng(0)
    for folder in (root / "LLaVA-Pretrain" / "images", root):
        folder.mkdir(parents=True, exist_ok=True)
        for name, ((width, height), _) in IMAGES.items():
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}.png")
    captions, instructions = [], []
    answer = {"from": "gpt", "value": "blue"}
    for images in (["photo"], ["banner"], ["stamp"], ["banner", "photo"], []):
        name, paths = "+".join(images), [f"{image}.png" for image in images]
        tags = "<image>\n" * len(images)
        turns = [{"from": "human", "value": f"{tags}what color is the shape?"}, answer]
        instructions.append({"id": name, "image": paths, "conversations": turns})
        if len(images) == 1:
            captions.append({"id": name, "image": paths[0], "conversations": turns})
    file = root / "LLaVA-Pretrain" / "blip_laion_cc_sbu_558k.json"
    file.write_text(json.dumps(captions))
    (root / "llava_v1_5_mix665k.json").write_text(json.dumps(instructions))


@pytest.fixture
def train(options, tmp_path, monkeypatch):
    def run(name: str, *flags: str) -> Path:
        monkeypatch.chdir(tmp_path)
        command = ["train.py", "internvl2_covft", "--work-dir", str(tmp_path / name), *flags]
        monkeypatch.setattr(sys, "argv", [*command, "--cfg-options", *options])
        runpy.run_path(str(TOOL), run_name="__main__")
        return tmp_path / name

    return run


class _Colors(Benchmark):
    name = "colors"
    max_new_tokens = 4

    def read_items(self) -> list[Item]:
        question = "what color is the shape?"
        return [Item(name, question, "blue", (f"data/{name}.png",)) for name in IMAGES]

    def is_correct(self, prediction: str, item: Item) -> bool:
        return prediction == item.answer


def test_it_trains_resumes_loads_and_answers(train, monkeypatch, tmp_path: Path) -> None:
    whole = train("whole")
    original = ScalarsHook.after_train_iter

    def stop(self, runner, batch_idx, data_batch=None, outputs=None):
        original(self, runner, batch_idx, data_batch, outputs)
        if Path(runner.work_dir).name == "finetune" and batch_idx == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ScalarsHook, "after_train_iter", stop)
        train("cut")
    cut = train("cut", "--resume")
    for stage, steps in zip(STAGES, (2, 3), strict=True):
        records = read_scalars(whole / stage / "scalars.jsonl")
        assert len(records) == steps and all(0 < record["loss"] < 10 for record in records)
        # DropPath is drawn anew after a resume; the weights agree only if its state was restored.
        expected, found = (load_file(p / stage / "weights.safetensors") for p in (whole, cut))
        assert all(torch.equal(expected[name], found[name]) for name in expected)

    run = load_run(cut, device="cpu")
    assert run.resize == Tiles(6) and run.model.llm.model.model.rotary_emb.rope_type == "longrope"
    assert [block.drop_path.training for block in run.model.vision.backbone.blocks] == [False] * 4
    rows = []
    run.model.vision.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    answers = {}
    for name, (_, squares) in IMAGES.items():
        session = ChatSession.of(run, [f"data/{name}.png"])
        answers[name] = session.ask("what color is the shape?", max_new_tokens=4)
        assert rows.pop() == squares
    result = evaluate(
        run.model,
        run.spec,
        _Colors(root="data"),
        tmp_path,
        weights_id="x",
        resize=run.resize,
        batch_size=3,
    )
    lines = result.predictions.read_text().splitlines()[1:]
    assert {r["id"]: r["prediction"] for r in map(json.loads, lines)} == answers
    assert rows == [11]

    # Exported, and read by transformers with the code that was written beside the weights.
    assert export_run(cut, tmp_path / "hf", to="hf", device="cpu") < 1e-5
    options = {"trust_remote_code": True, "local_files_only": True}
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", **options).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", **options)
    for name, answer in answers.items():
        with Image.open(f"data/{name}.png") as image:
            inputs = processor(text="what color is the shape?", images=[image.convert("RGB")])
        ids = exported.generate(**inputs, max_new_tokens=4)
        assert [text.strip() for text in processor.batch_decode(ids)] == [answer]


def test_stages_see_the_tiles_and_their_context(options, monkeypatch, tmp_path) -> None:
    from mmengine.config import DictAction

    from covft.checkpoints import build_model
    from covft.config import load_config, stage_configs
    from covft.datasets import Collator
    from covft.engine.train import build_dataset

    monkeypatch.chdir(tmp_path)
    pairs = (option.split("=", 1) for option in options)
    parsed = {key: DictAction._parse_iterable(value) for key, value in pairs}
    stages = dict(stage_configs(load_config("internvl2_covft", parsed)))
    model = build_model(stages["finetune"])
    dataset = build_dataset(stages["finetune"], model)
    batch = Collator(dataset.spec)([dataset[index] for index in range(5)])
    squares = [7, 3, 1, 3 + 1, 0]  # of three tiles each, 4 : 3 takes one
    expected = [index for index, count in enumerate(squares) for _ in range(count)]
    assert batch["image_to_sample"].tolist() == expected
    marked = [[] for _ in squares]
    marks = dataset.spec.tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
    for row, ids in enumerate(batch["input_ids"].tolist()):
        marked[row] = [i for i in ids if i in marks]
    assert marked == [marks, marks, marks, marks * 2, []]
    assert (batch["input_ids"] == IMAGE_TOKEN_ID).sum(1).tolist() == [4 * n for n in squares]
    contexts = []
    model.vision.register_forward_hook(lambda _m, args, _o: contexts.append(args[1]))
    batch.pop("bad_samples")
    model.train()(**batch).loss_sum.backward()
    texts = model.text_encoder(batch["context_ids"], batch["context_mask"]).pooled
    assert torch.equal(contexts[0].pooled, texts[expected])
    trained = [p for p in model.vision.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    first = build_dataset(stages["pretrain"], build_model(stages["pretrain"]))
    assert [len(first[index].pixel_values) for index in range(3)] == [7, 3, 1]
