"""Check that xtuner's LLaVAModel and this project's MLLM have the same loss and gradients.

xtuner 0.2.0 needs transformers 4.48, this project a newer one, so that each runs in an environment
of its own, on the same tiny weights and batch, in float64 (up to the logits):

    python tests/interop/check_xtuner_parity.py prepare FOLDER     # where covft is installed
    python -m venv VENV && VENV/bin/pip install -r requirements/xtuner.txt
    VENV/bin/python tests/interop/check_xtuner_parity.py check FOLDER

``prepare`` writes the models, the batch, and our loss and gradients; ``check`` exits with 1 if
xtuner's differ by more than rounding. Compared are a batch with one image, two images and none, the
loss, and the gradient of every parameter of encoder (up to the layer that is read), projector and
LLM.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

IGNORE, IMAGE = -100, -200  # xtuner's; ours expands the latter
ROWS = [
    ([1, 5, IMAGE, 9, 11, 13, 2], [IGNORE, IGNORE, IGNORE, IGNORE, 11, 13, 2]),
    ([1, IMAGE, 7, IMAGE, 8, 2], [IGNORE, IGNORE, IGNORE, IGNORE, 8, 2]),
    ([1, 20, 21, 22, 2], [IGNORE, IGNORE, 21, 22, 2]),
]
LLM = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
}
#: transformers 4.48 takes the cross-entropy in float32, whatever the model's type.
TOLERANCE = 1e-5
_libraries: list = []


def prepare(folder: Path) -> None:
    """Write models, batch, and our loss and gradients."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from covft.models import CLIP, MLLM, CausalLM, MLPProjector
    from covft.vft import Full

    torch.manual_seed(0)
    for name, model in (
        ("llm", LlamaForCausalLM(LlamaConfig(**LLM, tie_word_embeddings=False))),
        ("clip", CLIPVisionModel(CLIPVisionConfig(**VISION))),
    ):
        _randomise(model)
        model.save_pretrained(folder / name)
    model = MLLM(
        vision={"backbone": {"type": CLIP, "weights": str(folder / "clip")}, "vft": {"type": Full}},
        projector={"type": MLPProjector},
        llm={"type": CausalLM, "arch": {"model_type": "llama", **LLM}},
    )
    model.llm.model.load_state_dict(load_file(folder / "llm" / "model.safetensors"))
    _randomise(model.projector)
    model.double()
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    output = model(**_our_batch(pixels, model.num_image_tokens))
    loss = output.loss_sum / output.num_tokens
    loss.backward()
    parts = {"": loss.detach(), **_public_gradients(model)}
    save_file(
        {f"gradient.{name}" if name else "loss": value for name, value in parts.items()},
        folder / "expected.safetensors",
    )
    projector = {name: value.detach() for name, value in model.projector.named_parameters()}
    save_file({"pixels": pixels, **projector}, folder / "inputs.safetensors")
    print(f"loss {loss.item():.12f}, {len(parts) - 1} gradients in {folder}")


def check(folder: Path) -> int:
    """Compare xtuner's loss and gradients; return the exit status."""
    _make_torchvision_importable()
    from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel
    from xtuner.model import LLaVAModel

    vision = CLIPVisionModel(CLIPVisionConfig(**VISION))
    # transformers 5 writes these names without the prefix that 4.48 expects.
    weights = load_file(folder / "clip" / "model.safetensors")
    vision.vision_model.load_state_dict(
        {name.removeprefix("vision_model."): value for name, value in weights.items()}
    )
    model = LLaVAModel(
        llm=AutoModelForCausalLM.from_pretrained(folder / "llm", torch_dtype=torch.float64),
        visual_encoder=vision.double(),
        use_activation_checkpointing=False,
    )
    inputs = load_file(folder / "inputs.safetensors")
    with torch.no_grad():
        for name, parameter in model.projector.model.named_parameters():
            parameter.copy_(inputs[f"layers.{name}"])
    loss = model(_xtuner_batch(inputs["pixels"]), mode="loss")["loss"]
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = load_file(folder / "expected.safetensors")
    theirs = {"loss": loss.detach(), **{f"gradient.{n}": g for n, g in gradients.items()}}
    # A key's bias has no gradient but rounding errors, which differ.
    floor = 1e-6 * max(float(value.abs().max()) for value in expected.values())
    errors = {
        name: float((theirs[name] - value).abs().max() / value.abs().max().clamp(min=floor))
        for name, value in expected.items()
        if name in theirs
    }
    report = {
        "loss": loss.item(),
        "ours": float(expected["loss"]),
        "compared": len(errors),
        "worst": max(errors, key=lambda name: errors[name], default=None),
        "largest_relative_error": max(errors.values(), default=float("nan")),
        "only_ours": sorted(expected.keys() - theirs.keys()),
        "only_xtuners": sorted(theirs.keys() - expected.keys()),
    }
    print(json.dumps(report, indent=1))
    alike = theirs.keys() == expected.keys() and report["largest_relative_error"] < TOLERANCE
    return 0 if alike else 1


def _make_torchvision_importable() -> None:
    """Declare operators where torchvision's build for GPUs meets torch's for CPUs.

    There it can't load its own operators, and fails on import. Nothing here uses them.
    """
    if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)


def _our_batch(pixels: torch.Tensor, per_image: int) -> dict:
    from covft.conversation import IMAGE_TOKEN_ID

    rows = []
    for ids, labels in ROWS:
        row: tuple[list[int], list[int]] = ([], [])
        for token, label in zip(ids, labels, strict=True):
            count = per_image if token == IMAGE else 1
            row[0].extend([IMAGE_TOKEN_ID if token == IMAGE else token] * count)
            row[1].extend([label] * count)
        rows.append(row)
    length = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([row + [IGNORE] * (length - len(row)) for _, row in rows]),
        "attention_mask": torch.tensor(
            [[True] * len(ids) + [False] * (length - len(ids)) for ids, _ in rows]
        ),
        "pixel_values": pixels,
        "image_to_sample": torch.tensor([0, 1, 1]),
    }


def _xtuner_batch(pixels: torch.Tensor) -> dict:
    length = max(len(ids) for ids, _ in ROWS)
    # A row without an image takes one of zeros, of which it uses nothing.
    return {
        "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in ROWS]),
        "labels": torch.tensor([row + [IGNORE] * (length - len(row)) for _, row in ROWS]),
        "attention_mask": torch.tensor(
            [[True] * len(ids) + [False] * (length - len(ids)) for ids, _ in ROWS]
        ),
        "pixel_values": torch.cat([pixels, torch.zeros_like(pixels[:1])]),
    }


def _public_gradients(model) -> dict[str, torch.Tensor]:
    """Return our gradients under xtuner's names."""

    def gradients(module):
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    vision = model.vision.backbone.export_state_dict(gradients(model.vision.backbone))
    parts = {
        "visual_encoder": vision,
        "projector.model": {
            name.removeprefix("layers."): value
            for name, value in gradients(model.projector).items()
        },
        "llm": gradients(model.llm.model),
    }
    return {
        f"{part}.{name}": value.contiguous()
        for part, values in parts.items()
        for name, value in values.items()
    }


@torch.no_grad()
def _randomise(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        centre = 1.0 if parameter.ndim == 1 else 0.0
        parameter.copy_(centre + 0.2 * torch.randn(parameter.shape))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=("prepare", "check"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.step == "check":
        return check(args.folder)
    args.folder.mkdir(parents=True, exist_ok=True)
    prepare(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
