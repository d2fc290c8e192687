"""Models whose parameters are in bfloat16."""

import pytest
import torch

from covft.config import load_config, stage_configs
from covft.datasets import Collator, EasyVQADataset, InputSpec
from covft.engine import build_optim_wrapper
from covft.models import MLLM
from covft.registry import MODELS


def build(options, method: str = "covft", **changes) -> MLLM:
    torch.manual_seed(0)
    cfg = load_config(f"quickstart_{method}", {**options, **changes})
    model = MODELS.build(stage_configs(cfg)[-1][1].model)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float32) * 0.05
            parameter.copy_((parameter + noise).bfloat16())  # the same values in any type
    return model.train()


def make_batch(model: MLLM, options) -> dict:
    dataset = EasyVQADataset(options["train_dataset.root"], spec=InputSpec.of(model))
    batch = Collator(dataset.spec, pack=True)([dataset[i] for i in range(3)])
    batch.pop("bad_samples")
    return batch


def test_one_key_casts_every_part(tiny_options) -> None:
    model = build(tiny_options, **{"model.dtype": "bfloat16"})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {part.split(".")[0] for part, _ in model.named_parameters()} == {
        "vision",
        "projector",
        "llm",
        "text_encoder",
    }
    assert model.vision.mean.dtype == model.vision.std.dtype == torch.float32


def test_an_llms_own_type_goes_first(tiny_options) -> None:
    changes = {"model.dtype": "bfloat16", "model.llm.dtype": "float32"}
    model = build(tiny_options, **changes)
    assert {p.dtype for p in model.llm.parameters()} == {torch.float32}
    assert {p.dtype for p in model.vision.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("autocast", [True, False])
def test_loss_and_gradients_are_near_those_in_float32(autocast: bool, tiny_options) -> None:
    model = build(tiny_options, **{"model.dtype": "bfloat16"})
    exact = build(tiny_options)
    batch = make_batch(model, tiny_options)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(**batch)
    output.loss_sum.backward()
    expected = exact(**batch)
    expected.loss_sum.backward()
    assert output.loss_sum.dtype == torch.float32
    assert output.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=0.02)
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    wanted = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])
    assert found.dtype == torch.bfloat16 and len(found) == len(wanted)
    assert torch.cosine_similarity(found.float(), wanted, dim=0) > 0.98


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_training_lowers_the_loss_like_float32(precision: str, tiny_options) -> None:
    def losses(dtype: str, optimizer: dict) -> list[float]:
        model = build(tiny_options, **{"model.dtype": dtype})
        batch = make_batch(model, tiny_options)
        cfg = {"optimizer": {"lr": 1e-3, "weight_decay": 0.0, **optimizer}, "precision": precision}
        wrapper = build_optim_wrapper(model, cfg)
        found = []
        for _ in range(8):
            with wrapper.micro_batch(model, last=True):
                output = model(**batch)
            wrapper.backward(output.loss_sum / output.num_tokens)
            wrapper.clip_gradients()
            wrapper.step()
            wrapper.zero_grad()
            found.append(float(output.loss_sum / output.num_tokens))
        return found

    found = losses("bfloat16", {"type": "BF16AdamW", "moments": "float32"})
    wanted = losses("float32", {"type": "AdamW"})
    assert wanted[-1] < 0.9 * wanted[0]
    assert found == pytest.approx(wanted, rel=0.05)


def test_unknown_types_are_refused(tiny_options) -> None:
    with pytest.raises(ValueError, match=r"model\.dtype"):
        build(tiny_options, **{"model.dtype": "float16"})
