import shutil

import pytest
import torch
from miniature import ARCH
from quickstart_miniature import noisy_model

from covft.config import CONFIG_ROOT, load_config, stage_configs
from covft.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from covft.datasets import Collator, EasyVQADataset, InputSpec
from covft.datasets.prompts import Prompt, collate_prompts
from covft.models import MLLM, PixelShuffleProjector
from covft.registry import MODELS

MEANS = {"CLIP": 0.481, "SigLIP": 0.5, "DINOv2": 0.485, "DINOv3": 0.485, "InternViT": 0.485}
FAMILIES = ["CLIP", "SigLIP", "DINOv2", "DINOv3", "InternViT"]


def make_batch(model: MLLM, options, size: int = 3) -> dict:
    dataset = EasyVQADataset(options["train_dataset.root"], spec=InputSpec.of(model))
    batch = Collator(dataset.spec)([dataset[i] for i in range(size)])
    batch.pop("bad_samples")
    return batch


def test_loss_equals_the_parts_put_together_by_hand(tiny_options) -> None:
    model = noisy_model(tiny_options).double().eval()
    batch = make_batch(model, tiny_options)
    output = model(**batch)

    losses, count = [], 0
    for row in range(3):
        n = int(batch["attention_mask"][row].sum())
        ids, labels = batch["input_ids"][row, :n], batch["labels"][row, :n]
        context = model.text_encoder(
            batch["context_ids"][row : row + 1], batch["context_mask"][row : row + 1]
        )
        tokens = model.projector(model.vision(batch["pixel_values"][row : row + 1], context))[0]
        first = int((ids == IMAGE_TOKEN_ID).nonzero()[0])
        table = model.llm.model.get_input_embeddings().weight
        embeds = torch.cat([table[ids[:first]], tokens, table[ids[first + len(tokens) :]]])
        logits = model.llm.model(inputs_embeds=embeds[None]).logits[0]
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum"
            )
        )
        count += int((labels[1:] != IGNORE_INDEX).sum())
    assert output.num_tokens == count
    torch.testing.assert_close(output.loss_sum, sum(losses), rtol=1e-10, atol=1e-10)


def test_text_only_samples_leave_the_vision_side_without_gradient(tiny_options) -> None:
    model = noisy_model(tiny_options)
    batch = make_batch(model, tiny_options)
    keep = batch["input_ids"] != IMAGE_TOKEN_ID
    rows = [batch["input_ids"][i][keep[i]][:12] for i in range(3)]
    labels = [batch["labels"][i][keep[i]][:12] for i in range(3)]
    text_only = {
        **batch,
        "input_ids": torch.stack(rows),
        "labels": torch.stack(labels),
        "attention_mask": torch.ones(3, 12, dtype=torch.bool),
        "pixel_values": batch["pixel_values"][:0],
        "image_to_sample": batch["image_to_sample"][:0],
    }
    model(**text_only).loss_sum.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("llm."):
            assert parameter.grad is not None, f"{name} isn't in the graph"
            assert not parameter.grad.any(), name


def test_several_images_of_a_sample(tiny_options) -> None:
    model = noisy_model(tiny_options).eval()
    spec = InputSpec.of(model)
    dataset = EasyVQADataset(tiny_options["train_dataset.root"], spec=spec)
    from covft.images import load_image

    images = [load_image(dataset.image_root / "train" / "images" / f"{i}.png") for i in range(2)]
    turns = [{"from": "human", "value": "<image><image>what shape is in the image?"}]
    batch = collate_prompts(
        [Prompt("two", turns, images), Prompt("none", turns_without(turns))], spec
    )
    found = (batch["input_ids"] == IMAGE_TOKEN_ID).sum(1).tolist()
    assert found == [2 * model.num_image_tokens, 0]
    assert len(model.generate(**batch, max_new_tokens=3)) == 2


def turns_without(turns):
    return [{**turn, "value": turn["value"].replace("<image>", "")} for turn in turns]


def test_wrong_counts_name_the_sample(tiny_options) -> None:
    model = noisy_model(tiny_options)
    batch = make_batch(model, tiny_options)
    batch["pixel_values"] = batch["pixel_values"][:2]
    batch["image_to_sample"] = batch["image_to_sample"][:2]
    name = batch["sample_ids"][2]
    with pytest.raises(ValueError, match=f"sample '{name}' has 0 images but 4 placeholders"):
        model(**batch)


def test_missing_context_is_explained(tiny_options) -> None:
    model = noisy_model(tiny_options)
    batch = make_batch(model, tiny_options)
    batch["context_ids"] = None
    with pytest.raises(ValueError, match="CoVFT reads the instruction"):
        model(**batch)


@pytest.mark.parametrize("method", ["covft", "freeze"])
def test_generation_of_a_padded_batch_equals_one_by_one(tiny_options, method: str) -> None:
    model = noisy_model(tiny_options, method).double().eval()
    spec = InputSpec.of(model)
    dataset = EasyVQADataset(tiny_options["train_dataset.root"], spec=spec)
    from covft.images import load_image

    image = load_image(dataset.image_root / "train" / "images" / "0.png")
    questions = ["is there a red shape?", "is it?", "what color is the shape in this image?"]
    prompts = [Prompt(q, [{"from": "human", "value": f"<image>{q}"}], [image]) for q in questions]
    together = model.generate(**collate_prompts(prompts, spec), max_new_tokens=6)
    alone = [model.generate(**collate_prompts([p], spec), max_new_tokens=6)[0] for p in prompts]
    assert together == alone
    assert all(len(ids) == 6 for ids in alone)


def test_generation_encodes_once(tiny_options, monkeypatch: pytest.MonkeyPatch) -> None:
    model = noisy_model(tiny_options).eval()
    spec = InputSpec.of(model)
    calls = []
    for part in (model.vision, model.text_encoder):
        part.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    from PIL import Image

    turns = [{"from": "human", "value": "<image>what is it?"}]
    prompt = Prompt("x", turns, [Image.new("RGB", (20, 20))])
    model.generate(**collate_prompts([prompt], spec), max_new_tokens=5)
    assert sorted(calls) == ["TextEncoder", "VisionTower"]


def test_frozen_parts_stay_in_eval_mode(tiny_options) -> None:
    model = noisy_model(tiny_options).train()
    assert model.training and model.vision.backbone.training and model.llm.training
    assert not any(module.training for module in model.text_encoder.modules())
    frozen = noisy_model({**tiny_options, "model.llm.freeze": True}, "freeze").train()
    assert not frozen.llm.model.training and not frozen.vision.backbone.training
    assert frozen.text_encoder is None


@pytest.mark.parametrize("family", FAMILIES)
def test_one_option_swaps_the_encoder_and_what_depends_on_it(tiny_options, family: str) -> None:
    options = {
        **tiny_options,
        "model.vision.backbone.arch": {**ARCH, "patch_size": 16 if family == "SigLIP" else 8},
        "model.vision.backbone.type": family,
    }
    model = noisy_model(options)
    spec = InputSpec.of(model)
    size = 4 * (16 if family == "SigLIP" else 8)
    assert type(model.vision.backbone).__name__ == family
    assert spec.image.image_size == size and spec.num_image_tokens == 4
    assert spec.image.mean[0] == pytest.approx(MEANS[family], abs=1e-3)
    batch = make_batch(model, options)
    assert batch["pixel_values"].shape[-1] == size
    model.train()(**batch).loss_sum.backward()
    grads = [p.grad for p in model.vision.parameters() if p.requires_grad]
    assert all(grad is not None for grad in grads) and any(grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("part", "family"),
    [
        ("clip_l_336", "CLIP"),
        ("siglip_l_384", "SigLIP"),
        ("dinov3_l_384", "DINOv3"),
        ("internvit_300m_448", "InternViT"),
    ],
)
def test_one_import_line_swaps_the_encoder(tiny_options, tmp_path, part: str, family: str) -> None:
    shutil.copytree(CONFIG_ROOT, tmp_path / "configs")
    recipe = tmp_path / "configs" / "quickstart_covft.py"
    recipe.write_text(recipe.read_text().replace("dinov2_small", part))
    model = MODELS.build(stage_configs(load_config(recipe, tiny_options))[-1][1].model)
    assert type(model.vision.backbone).__name__ == family
    batch = make_batch(model, tiny_options)
    assert batch["pixel_values"].shape[-1] == 32 and InputSpec.of(model).num_image_tokens == 4
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    before = model.train()(**batch).loss_sum
    before.backward()
    optimizer.step()
    assert model(**batch).loss_sum < before


def test_pixel_shuffle_order_and_odd_grids() -> None:
    from covft.models.projectors import pixel_shuffle

    grid = torch.arange(16.0).reshape(1, 16, 1)
    assert pixel_shuffle(grid, 4, 2)[0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]
    with pytest.raises(ValueError, match="divisible by 2, got 49 features"):
        PixelShuffleProjector(in_dim=4, out_dim=4, num_tokens=49)


def test_init_scale_enlarges_the_visual_tokens() -> None:
    outputs = []
    for init_scale in (1.0, 4.0):
        torch.manual_seed(0)
        projector = PixelShuffleProjector(in_dim=4, out_dim=8, num_tokens=16, init_scale=init_scale)
        torch.nn.init.zeros_(projector.layers[-1].bias)
        outputs.append(projector(torch.ones(1, 16, 4).cumsum(1)))
    torch.testing.assert_close(outputs[1], 4 * outputs[0])
