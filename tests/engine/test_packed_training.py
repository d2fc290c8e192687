"""Training on packed rows against training on padded batches, through the loop."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from covft.config import load_config, stage_configs
from covft.datasets import Collator, InputSpec, InstructDataset
from covft.engine import Runner, build_dataloader
from covft.engine.flops import cost_model
from covft.registry import MODELS

BATCH_SIZE, ACCUMULATION, STEPS = 3, 2, 5
ANSWERS = ("red", "no, there is none at all", "a circle and two triangles " * 4, "yes", "blue", "3")
OPTIM_WRAPPER = {
    # A large eps: where a gradient is zero but for rounding, Adam would magnify that.
    "optimizer": {"type": "AdamW", "lr": 1e-3, "eps": 1e-4},
    "clip_grad": {"max_norm": 0.5},
    "precision": "fp32",
}


def make_dataset(spec: InputSpec, folder) -> InstructDataset:
    """18 samples: one image, text alone, several images, and one whose image is missing."""
    for index, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (20 + index, 24), color).save(folder / f"{index}.png")
    records = []
    for index in range(18):
        images = {1: [], 2: [0, 1], 5: ["none"]}.get(index % 6, [index % 3])
        human = "<image>" * len(images) + "what is it? " * (1 + index % 4)
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": ANSWERS[index % 6]}]
        record = {"id": str(index), "conversations": turns}
        records.append({**record, "image": [f"{i}.png" for i in images]} if images else record)
    return InstructDataset(records, spec=spec, image_root=str(folder))


def train(options: dict, folder, work_dir, *, pack: bool) -> tuple[list[dict], dict]:
    """Train; return what was logged by step, and the final weights."""
    torch.manual_seed(0)
    model = MODELS.build(
        stage_configs(load_config("quickstart_covft", options))[-1][1].model
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    dataset = make_dataset(InputSpec.of(model), folder)
    loader = build_dataloader(
        dataset,
        Collator(dataset.spec, pack=pack),
        batch_size=BATCH_SIZE,
        accumulation=ACCUMULATION,
        num_workers=0,
        pack=pack,
        cost=cost_model(model) if pack else None,
    )
    runner = Runner.from_parts(
        model=model,
        dataloader=loader,
        train_cfg={"max_iters": STEPS, "accumulation": ACCUMULATION},
        optim_wrapper=OPTIM_WRAPPER,
        work_dir=work_dir,
    )
    runner.train()
    lines = (work_dir / "scalars.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], load_file(work_dir / "weights.safetensors")


@pytest.mark.parametrize("llm", ["llama", "phi3"])
def test_packed_training_equals_padded_training(tiny_options, tmp_path, llm: str) -> None:
    options = {**tiny_options, "model.llm.arch.model_type": llm}
    if llm == "phi3":
        options |= {"model.llm.arch.pad_token_id": 0, "model.llm.arch.sliding_window": 6}
    (padded, expected), (packed, found) = (
        train(options, tmp_path, tmp_path / str(pack), pack=pack) for pack in (False, True)
    )
    assert len(padded) == len(packed) == STEPS
    for ours, theirs in zip(packed, padded, strict=True):
        assert ours["tokens"] == theirs["tokens"] > 0
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-9), (ours, theirs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert float((found[name] - value).abs().max()) <= 1e-10 * max(scale, 0.1), name
