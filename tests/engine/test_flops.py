"""The count of operations, against what torch counts in real passes, and against known figures."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from miniature import ARCH as MINIATURE
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from covft.config import load_config, stage_configs
from covft.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from covft.engine.flops import FlopModel, Stream, Tally, Work, count, language, peak_tflops
from covft.models.abstract import abstract_model
from covft.models.mllm import MLLM
from covft.registry import MODELS

torch.set_num_threads(1)

ARCH = {**MINIATURE, "depth": 4}
LLAMA = dict(
    model_type="llama",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=50,
    tie_word_embeddings=False,
)
PHI = {**LLAMA, "model_type": "phi3", "num_key_value_heads": 4, "pad_token_id": 0}
BERT = dict(
    model_type="bert",
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=30,
)
QMOE = dict(num_queries=5, dim=16, num_layers=2, num_experts=3, num_heads=2)
METHODS = {
    "Freeze": dict(type="Freeze"),
    "Full": dict(type="Full"),
    "BitFit": dict(type="BitFit"),
    "LoRA": dict(type="LoRA", rank=3),
    "VPT": dict(type="VPT", num_prompts=3),
    "SVPT": dict(type="SVPT", num_prompts=3),
    "QAViT": dict(type="QAViT", max_text_tokens=5),
    "QMoE": dict(type="QMoE", **QMOE),
    "CoVFT": dict(type="CoVFT", num_experts=3),
    "CoVFT, one late block": dict(type="CoVFT", num_experts=2, first_block=2, last_block=2),
    "CoVFT, shared CVE": dict(type="CoVFT", first_block=0, shared_cve=True),
    "CoVFT, all norms": dict(type="CoVFT", norms="all"),
    "CoVFT, text-only": dict(type="CoVFT", context="text-only"),
    "CoVFT, image-only": dict(type="CoVFT", context="image-only"),
    "CoVFT, concat": dict(type="CoVFT", context="concat"),
    "CoVFT, none": dict(type="CoVFT", context="none"),
    "CoVFT, sparse": dict(type="CoVFT", num_experts=3, routing="sparse@2"),
    "CoVFT, uniform": dict(type="CoVFT", routing="uniform"),
    "CoVFT, random": dict(type="CoVFT", num_experts=3, routing="random@2"),
}
SAMPLES, LENGTH, TEXT = 2, 24, 7
WORK = Work((LENGTH,) * SAMPLES, 2 * 5, (TEXT,) * SAMPLES, (TEXT,) * SAMPLES)


def build(vft: dict, *, backbone: str = "CLIP", projector: dict | None = None, **llm: Any) -> MLLM:
    torch.manual_seed(0)
    cfg = dict(
        vision=dict(backbone=dict(type=backbone, arch=ARCH), vft=vft),
        projector=projector or dict(type="MLPProjector"),
        llm={"type": "CausalLM", "arch": LLAMA, **llm},
        text_encoder=dict(type="TextEncoder", arch=BERT),
    )
    model: MLLM = MODELS.build(dict(type="MLLM", **cfg))
    return model.train()


def batch_for(model: MLLM) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (SAMPLES, LENGTH), generator=generator)
    ids[:, 1 : 1 + model.num_image_tokens] = IMAGE_TOKEN_ID
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -5:] = ids[:, -5:]
    size = ARCH["image_size"]
    batch = dict(
        input_ids=ids,
        labels=labels,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        pixel_values=torch.randint(0, 256, (SAMPLES, 3, size, size), dtype=torch.uint8),
        image_to_sample=torch.arange(SAMPLES),
    )
    if model.text_encoder is not None:
        batch["context_ids"] = torch.randint(1, 30, (SAMPLES, TEXT), generator=generator)
        batch["context_mask"] = torch.ones(SAMPLES, TEXT, dtype=torch.bool)
    return batch


def executed(model: MLLM) -> tuple[int, int]:
    """Return the operations of the products that torch executes, forward and backward."""
    batch = batch_for(model)
    # Of a frozen copy: the loss may compute gradients in its forward.
    frozen = copy.deepcopy(model).requires_grad_(False)
    forward = _products(lambda: frozen(**batch))
    return forward, _products(lambda: model(**batch).loss_sum.backward()) - forward


def _products(run: Callable[[], object]) -> int:
    # torch's own table leaves out the product that is added in place.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place})
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return counter.get_total_flops()


def _in_place(total: Any, left: Any, right: Any, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def counted(model: MLLM, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    # torch's plain attention computes the whole square.
    monkeypatch.setattr(language, "causal_pairs", lambda length, window: length**2)
    flops = FlopModel(model).of(WORK if model.text_encoder else Work.of(batch_for(model)))
    return flops.forward, flops.backward


@pytest.mark.parametrize("method", METHODS)
def test_every_product_of_every_method_is_counted(method, monkeypatch) -> None:
    model = build(METHODS[method])
    assert counted(model, monkeypatch) == executed(model)


@pytest.mark.parametrize("backbone", ["SigLIP", "DINOv2", "DINOv3", "InternViT"])
@pytest.mark.parametrize("method", ["SVPT", "QAViT", "CoVFT"])
def test_every_encoder_is_counted(backbone, method, monkeypatch) -> None:
    model = build(METHODS[method], backbone=backbone)
    assert counted(model, monkeypatch) == executed(model)


@pytest.mark.parametrize(
    "llm",
    [
        dict(freeze=True),
        dict(lora=dict(rank=3, alpha=6)),
        dict(freeze_embeddings=True),
        dict(arch={**LLAMA, "tie_word_embeddings": True}),
        dict(arch=PHI),
        dict(arch={**LLAMA, "model_type": "qwen2"}),
    ],
    ids=["frozen", "lora", "frozen embeddings", "tied", "phi3", "qwen2"],
)
@pytest.mark.parametrize("method", ["Freeze", "CoVFT"])
def test_every_kind_of_llm_is_counted(llm, method, monkeypatch) -> None:
    model = build(METHODS[method], **llm)
    assert counted(model, monkeypatch) == executed(model)


def test_backward_ends_before_the_first_trainable_part(monkeypatch) -> None:
    model = build(METHODS["Freeze"], projector=dict(type="PixelShuffleProjector"))
    assert counted(model, monkeypatch) == executed(model)
    model.projector.requires_grad_(False)
    model.llm.requires_grad_(False)
    model.llm.model.model.layers[1].requires_grad_(True)
    forward, backward = counted(model, monkeypatch)
    assert (forward, backward) == executed(model)
    assert backward < 1.5 * forward


def test_context_none_runs_no_text_encoder() -> None:
    parts = FlopModel(build(METHODS["CoVFT, none"])).parts(WORK)
    assert parts["text_encoder"].total == 0
    assert FlopModel(build(METHODS["CoVFT"])).parts(WORK)["text_encoder"].forward > 0


def test_causal_attention_is_half_of_the_square_and_windows_cut_it() -> None:
    assert language.causal_pairs(10, None) == 50
    assert language.causal_pairs(10, 10) == language.causal_pairs(10, 99) == 50
    assert language.causal_pairs(10, 4) == 8 + 6 * 4
    window = {**PHI, "sliding_window": 8}
    full, cut = (FlopModel(build(METHODS["Freeze"], arch=arch)) for arch in (PHI, window))
    rows = 4 * 32 * 2  # scores and values, two operations each; the width; layers
    pairs = 24 * 24 / 2 - (32 + 16 * 8)
    assert full.of(WORK).forward - cut.of(WORK).forward == SAMPLES * rows * pairs


@pytest.mark.parametrize(
    ("recipe", "tflop"),
    [
        ("llava15_7b_freeze", 35.76),
        ("llava15_7b_full", 36.50),
        ("llava15_7b_covft", 37.50),
    ],
)
def test_llava_7b_at_full_size(recipe, tflop) -> None:
    stage = stage_configs(load_config(recipe))[-1][1]
    flops = FlopModel(abstract_model(stage.model).train())
    # 576 visual and 300 other tokens, the output layer computed at every position.
    parts = flops.parts(Work((876,), 876, (0,)))
    total = sum(part.total for part in parts.values()) / 1e12
    assert total == pytest.approx(tflop, rel=1e-3)
    vision = {"freeze": (0.366, 0), "full": (0.366, 0.731), "covft": (0.773, 1.327)}
    found = parts["vision"].forward / 1e12, parts["vision"].backward / 1e12
    assert found == pytest.approx(vision[recipe.split("_")[-1]], rel=2e-3)


def test_a_micro_batch_is_the_same_work_padded_and_packed() -> None:
    model = build(METHODS["CoVFT"])
    padded = batch_for(model)
    padded["attention_mask"][1, 20:] = False
    padded["labels"][1, 20:] = IGNORE_INDEX
    ids = [padded["input_ids"][0], padded["input_ids"][1, :20]]
    labels = [padded["labels"][0].clone(), padded["labels"][1, :20].clone()]
    packed = {
        **padded,
        "input_ids": torch.cat(ids)[None],
        "labels": torch.cat(labels)[None],
        "cu_seqlens": torch.tensor([0, 24, 44], dtype=torch.int32),
    }
    del packed["attention_mask"]
    assert Work.of(padded) == Work.of(packed) == Work((24, 20), 6, (7, 7), (7, 7))


def test_work_without_images_or_context() -> None:
    ids = torch.ones(1, 4, dtype=torch.long)
    batch = dict(labels=ids, attention_mask=ids.bool(), image_to_sample=torch.zeros(0).long())
    work = Work.of(batch)
    assert work == Work((4,), 3)
    model = build(METHODS["CoVFT"])
    parts = FlopModel(model).parts(work)
    assert parts["vision"].total == parts["projector"].total == parts["text_encoder"].total == 0
    assert parts["llm"].total > 0


def test_generation_is_a_prefill_and_a_pass_for_each_further_token() -> None:
    model = build(METHODS["CoVFT"]).eval()
    flops = FlopModel(model)
    one, three = (flops.generation(WORK, new_tokens=n) for n in (1, 3))
    states = [flops.parts(Work((length,), 1))["llm"].forward for length in (24, 26)]
    head = flops.parts(Work((), 1))["lm_head"].forward
    assert three - one == pytest.approx(2 * (states[1] - states[0]) + 2 * 2 * head)
    prompt = flops.of(Work(WORK.lengths, 2, WORK.image_texts, WORK.texts)).forward
    assert one == prompt


def test_routing_at_inference_is_counted() -> None:
    from covft.vft.comoe import CoMoE
    from covft.vft.inference import comoe_layers, inference_routing

    model = build(METHODS["CoVFT"]).eval()
    dense = FlopModel(model).parts(WORK)
    with inference_routing(model.vision, top_k=1):
        top_1 = FlopModel(model).parts(WORK)
    gates = {i: torch.full((1, 3), 1 / 3) for i in comoe_layers(model.vision)}
    with inference_routing(model.vision, gates=gates):
        fixed = FlopModel(model).parts(WORK)
    layers = [m for m in model.modules() if isinstance(m, CoMoE)]
    rows = ARCH["image_size"] ** 2 // ARCH["patch_size"] ** 2 + 1
    experts = 2 * (2 * 2 * rows * 32 * 64 + 2 * 32) * len(layers) * SAMPLES
    assert dense["vision"].forward - top_1["vision"].forward == experts
    assert fixed["vision"].forward < dense["vision"].forward
    assert fixed["text_encoder"].forward == 0 < top_1["text_encoder"].forward


def test_what_has_no_counter_is_refused() -> None:
    class Other(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Same(nn.Linear):
        pass

    plain = Tally()
    count(plain, nn.Linear(2, 3), Stream(5, True))
    same = Tally()
    count(same, Same(2, 3), Stream(5, True))
    assert plain.flops == same.flops
    with pytest.raises(ValueError, match=r"no counter of operations for .*Other; register one"):
        count(Tally(), Other(2, 3), Stream(1, False))


def test_a_parameter_that_no_counter_names_is_refused() -> None:
    model = build(METHODS["CoVFT"])
    model.vision.backbone.blocks[0].attn.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"the vision tower: .*blocks\.0\.attn\.extra\.weight"):
        FlopModel(model)
    model = build(METHODS["Freeze"])
    model.llm.model.model.layers[0].mlp.router = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"the LLM \(llama\): .*layers\.0\.mlp\.router\.weight"):
        FlopModel(model)
    model = build(METHODS["Freeze"])
    mlp = model.llm.model.model.layers[0].mlp
    mlp.up_projection = copy.deepcopy(mlp.up_proj)
    del mlp.up_proj
    with pytest.raises(ValueError, match=r"LlamaMLP, which has no 'up_proj'"):
        FlopModel(model)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla T4", None),
        ("AMD Instinct MI250X", 191.5),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_peaks_are_found_by_the_device_name(name, peak) -> None:
    assert peak_tflops(name) == peak
