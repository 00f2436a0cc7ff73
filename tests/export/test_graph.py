"""The exported graph against torch through ONNX Runtime: its contract, its inputs, its heads, its bytes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from numpy.typing import NDArray

from parkdet.export.config import GraphOptions
from parkdet.export.graph import Graph, build_graph, finished, float_graph, serialized
from parkdet.runtime import ModelSpec, decode_heads
from parkdet.runtime.errors import UsageError
from parkdet.runtime.model_spec import SPEC_KEY
from parkdet.train import forward_tta, load_checkpoint
from parkdet.train.model.network import Yolov5

CANVAS = (64, 96)


@pytest.fixture(scope="module")
def graph(network: Yolov5) -> Graph:
    return build_graph(network, GraphOptions(canvas_hw=CANVAS))


def run(graph: Graph, images: NDArray[Any]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(serialized(graph.model), providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, {"images": images})]


def canvases(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def rgb(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(images[..., ::-1].transpose(0, 3, 1, 2).copy()).float() / 255


def same_heads(network: Yolov5, graph: Graph, shape: tuple[int, ...]) -> None:
    images = canvases(*shape)
    with torch.no_grad():
        expected = network(rgb(images))
    for head, ours in zip(expected, run(graph, images), strict=True):
        np.testing.assert_allclose(ours, head.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_one_graph_serves_every_canvas_and_batch(network: Yolov5) -> None:
    graph = build_graph(network, GraphOptions())
    for shape in ((1, 32, 32, 3), (2, 192, 256, 3), (3, 320, 128, 3)):
        same_heads(network, graph, shape)


@pytest.mark.parametrize("batch", [1, 3])
def test_one_graph_serves_every_batch(network: Yolov5, graph: Graph, batch: int) -> None:
    same_heads(network, graph, (batch, *CANVAS, 3))


def test_the_contract(network: Yolov5, graph: Graph) -> None:
    model = graph.model
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")] == [20]
    (images,) = model.graph.input
    assert images.name == "images"
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    operators = [node.op_type for node in model.graph.node]
    assert "BatchNormalization" not in operators
    assert operators.index("Cast") < operators.index("Transpose")
    assert all(output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for output in model.graph.output)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    spec = ModelSpec.from_json(metadata[SPEC_KEY], "graph")
    assert spec == graph.spec
    assert (spec.class_names, spec.strides, spec.anchors) == (
        network.spec.class_names,
        network.spec.strides,
        network.spec.anchors,
    )
    assert [tensor.name for tensor in spec.outputs] == [output.name for output in model.graph.output]
    # Nothing of the machine that exported is in the file.
    assert b"site-packages" not in serialized(model)
    assert b"/" not in model.producer_name.encode() + model.doc_string.encode()


def test_a_fixed_canvas_and_batch(network: Yolov5) -> None:
    model = build_graph(network, GraphOptions(canvas_hw=(128, 192), batch=2)).model
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == [2, 128, 192, 3]
    assert not any(node.op_type == "Shape" for node in model.graph.node)
    with pytest.raises(UsageError, match="multiple of 16"):
        build_graph(network, GraphOptions(canvas_hw=(100, 128), batch=1))


@pytest.fixture(scope="module")
def decoded(network: Yolov5) -> Graph:
    return build_graph(network, GraphOptions(canvas_hw=CANVAS, head="decoded", input_format="float-nchw", tta=True))


def test_float_input_and_decoded_boxes_are_what_other_tools_expect(network: Yolov5, decoded: Graph) -> None:
    images = canvases(2, *CANVAS, 3)
    (found,) = run(decoded, rgb(images).numpy())
    expected = forward_tta(network, rgb(images)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    (output,) = decoded.spec.outputs
    assert (output.name, output.dtype, output.shape[1:]) == ("output0", "float32", expected.shape[1:])
    assert (decoded.spec.input_format, decoded.spec.head) == ("float-nchw", "decoded")
    compiled = openvino.compile_model(
        openvino.Core().read_model(serialized(decoded.model)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    np.testing.assert_allclose(compiled({"images": rgb(images).numpy()})["output0"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_equal_checkpoints_give_equal_bytes_in_another_process(network: Yolov5, decoded: Graph, tmp_path: Path) -> None:
    torch.save(network, tmp_path / "network.pt")
    script = (
        "import sys, torch, hashlib\n"
        "from parkdet.export.config import GraphOptions\n"
        "from parkdet.export.graph import build_graph, serialized\n"
        "network = torch.load(sys.argv[1], weights_only=False)\n"
        f"options = {decoded_options()!r}\n"
        "print(hashlib.sha256(serialized(build_graph(network, options).model)).hexdigest())\n"
    )
    import hashlib

    other = subprocess.run(
        [sys.executable, "-P", "-c", script, str(tmp_path / "network.pt")],
        capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7", "PATH": ""},
    )  # fmt: skip
    assert other.stdout.split()[-1] == hashlib.sha256(serialized(decoded.model)).hexdigest()


def decoded_options() -> GraphOptions:
    return GraphOptions(canvas_hw=CANVAS, head="decoded", input_format="float-nchw", tta=True)


@pytest.mark.slow
def test_a_decoded_graph_of_any_canvas(network: Yolov5) -> None:
    graph = build_graph(network, GraphOptions(head="decoded"))
    for shape in ((1, 64, 32, 3), (2, 96, 160, 3)):
        images = canvases(*shape)
        with torch.no_grad():
            expected = decode_heads([head.numpy() for head in network(rgb(images))], network.spec)
        np.testing.assert_allclose(run(graph, images)[0], expected, rtol=1e-3, atol=1e-3)
    half = finished(network, graph, GraphOptions(head="decoded", precision="fp16"))
    onnx.checker.check_model(half.model, full_check=True)
    (found,) = run(half, images)
    assert found.dtype == np.float32
    assert np.abs(found[..., :4] - expected[..., :4]).max() < 0.5


@pytest.mark.slow
def test_what_the_reference_decoded(shared: Path) -> None:
    fixture = np.load(shared / "fixtures" / "yolov5n6_nc14_official.npz")
    model = load_checkpoint(shared / "fixtures" / "yolov5n6_nc14_official.pt").model
    options = GraphOptions(canvas_hw=(192, 256), head="decoded", input_format="float-nchw")
    (found,) = run(build_graph(model, options), fixture["x_uint8"].astype(np.float32) / 255)
    assert (np.abs(found - fixture["decoded"]) <= 1e-4 + 1e-3 * np.abs(fixture["decoded"])).all()


def test_the_spec_of_a_graph_says_what_it_is(network: Yolov5, decoded: Graph) -> None:
    plain = float_graph(network, dataclasses.replace(decoded_options(), head="plugin"))
    assert plain.spec.head == "raw"
    assert {tensor.dtype for tensor in plain.spec.outputs} == {"float32"}
    assert decoded.spec.precision == "fp32"
