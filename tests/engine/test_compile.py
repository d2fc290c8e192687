"""Blocks compiled one by one: the same numbers, one graph each, names kept."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from covft.config import load_config, stage_configs
from covft.conversation import IMAGE_TOKEN_ID
from covft.datasets import Collator, EasyVQADataset, InputSpec
from covft.engine.compile import compile_blocks
from covft.models import MLLM
from covft.models.checkpointing import CheckpointingPolicy
from covft.registry import MODELS

EAGER_BACKEND = {"backend": "aot_eager", "fullgraph": True}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(options, method: str = "full", **changes) -> MLLM:
    torch.manual_seed(0)
    cfg = load_config(f"quickstart_{method}", {**options, **changes})
    model = MODELS.build(stage_configs(cfg)[-1][1].model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double().train()


def batches(model: MLLM, options) -> list[dict]:
    """Return packed batches of three and of five samples, and one without images."""
    dataset = EasyVQADataset(options["train_dataset.root"], spec=InputSpec.of(model))
    collate = Collator(dataset.spec, pack=True)
    found = [collate([dataset[i % len(dataset)] for i in range(size)]) for size in (3, 5, 3)]
    text = found[-1]
    text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == IMAGE_TOKEN_ID, 5)
    text["pixel_values"], text["image_to_sample"] = (
        text[name][:0] for name in ("pixel_values", "image_to_sample")
    )
    for batch in found:
        batch.pop("bad_samples")
    return found


def gradients(model: MLLM, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    model(**batch).loss_sum.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("method", "checkpointing"),
    [("full", False), pytest.param("full", "selective", marks=pytest.mark.slow), ("covft", 0.5)],
)
def test_gradients_are_those_of_the_uncompiled_model(method, checkpointing, tiny_options) -> None:
    changes = {
        "model.vision.backbone.checkpointing": checkpointing,
        "model.vision.backbone.drop_path": 0.3,
        "model.llm.checkpointing": checkpointing,
    }
    plain, model = (build(tiny_options, method, **changes) for _ in range(2))
    names = [name for name, _ in model.named_parameters()]
    with_llm = method == "full"
    setting = {**EAGER_BACKEND, "llm": with_llm}
    assert compile_blocks(model, setting) == (3 + 2 if with_llm else 3)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.state_dict().keys() == plain.state_dict().keys()
    three, _, text = batches(model, tiny_options)
    for batch in (three,) if checkpointing else (three, text):
        expected, found = gradients(plain, batch), gradients(model, batch)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] > 1


def test_lengths_and_image_counts_are_dynamic(tiny_options) -> None:
    model = build(tiny_options)
    compile_blocks(model, EAGER_BACKEND)
    three, five, text = batches(model, tiny_options)
    for batch in (three, five, text):
        gradients(model, batch)
    dataset = EasyVQADataset(tiny_options["train_dataset.root"], spec=InputSpec.of(model))
    four = Collator(dataset.spec, pack=True)([dataset[i] for i in range(4)])
    four.pop("bad_samples")
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (four, three, text):
            gradients(model, batch)


def test_blocks_share_their_graphs(tiny_options) -> None:
    model = build(tiny_options)
    assert compile_blocks(model, {**EAGER_BACKEND, "llm": False}) == 3
    gradients(model, batches(model, tiny_options)[0])
    assert counters["stats"]["unique_graphs"] == 1


def test_generation_runs_eagerly(tiny_options) -> None:
    model = build(tiny_options).float()
    compile_blocks(model, EAGER_BACKEND)
    model.eval()
    one = batches(model, tiny_options)[0]
    length = int(one["cu_seqlens"][1])
    ids = one["input_ids"][:, :length]
    pixels = one["pixel_values"][:1], one["image_to_sample"][:1]
    answers = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        pixel_values=pixels[0],
        image_to_sample=pixels[1],
        max_new_tokens=3,
    )
    assert len(answers[0]) == 3
    # The encoder is compiled for it; the LLM, whose lengths change at every token, isn't.
    assert counters["stats"]["unique_graphs"] == 1


def test_budgets_measure_compiled_blocks(tiny_options) -> None:
    changes = {
        "model.vision.backbone.checkpointing": {"budget_gb": 1},
        "model.llm.checkpointing": {"budget_gb": 1},
    }
    plain, model = build(tiny_options), build(tiny_options, **changes)
    compile_blocks(model, EAGER_BACKEND)
    for batch in batches(model, tiny_options)[:2]:
        expected, found = gradients(plain, batch), gradients(model, batch)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)
    assert [layer.gradient_checkpointing for layer in model.llm.layers] == [False] * 2


class LayerOfOldTransformers(nn.Module):
    """A layer that recomputes outside of what is compiled, as before transformers 5.23."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.inner = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing:
            return self._gradient_checkpointing_func(super().__call__, x)
        return super().__call__(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def test_budgets_are_measured_with_uncompiled_blocks_in_both_passes() -> None:
    layers = [LayerOfOldTransformers() for _ in range(2)]
    for layer in layers:
        layer.compile(**EAGER_BACKEND)
    policy = CheckpointingPolicy({"budget_gb": 1}, where="checkpointing")
    for measured in (True, False):
        x = torch.randn(3, 4)
        with policy.applied_to_transformers(layers, x):
            y = layers[1](layers[0](x))
        y.sum().backward()
        assert (counters["stats"]["unique_graphs"] == 0) == measured


def test_nothing_is_compiled_unless_asked_for(tiny_options) -> None:
    model = build(tiny_options)
    for setting in (None, False):
        assert compile_blocks(model, setting) == 0
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("max-autotune", "True, False or dict"),
        ({"vit": True}, "compile.*vit"),
        ({"vision": False, "llm": False}, "nothing to compile"),
    ],
)
def test_wrong_settings(setting, words) -> None:
    with pytest.raises(ValueError, match=words):
        compile_blocks(nn.Module(), setting)
