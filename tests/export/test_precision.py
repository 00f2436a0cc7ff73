"""FP16 in the graph: which operators are half, what stays float32, and weights that float16 cannot hold."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from parkdet.export.config import GraphOptions
from parkdet.export.contenders import half_contender, half_infer
from parkdet.export.graph import Graph, finished, float_graph, serialized
from parkdet.export.parity import reference_heads
from parkdet.runtime.errors import GateError
from parkdet.train.model.network import Yolov5

OPTIONS = GraphOptions(canvas_hw=(64, 96), tta=True, precision="fp16")


@pytest.fixture(scope="module")
def plain(network: Yolov5) -> Graph:
    return float_graph(network, OPTIONS)


@pytest.fixture(scope="module")
def half(network: Yolov5, plain: Graph) -> Graph:
    return finished(network, plain, OPTIONS)


def types(graph: Graph) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(graph.model, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def test_the_body_is_half_and_the_views_are_float(half: Graph) -> None:
    onnx.checker.check_model(half.model, full_check=True)
    known = types(half)
    convolutions = [node for node in half.model.graph.node if node.op_type == "Conv"]
    assert {known[name] for node in convolutions for name in (*node.input, *node.output)} == {onnx.TensorProto.FLOAT16}
    views = [n for n in half.model.graph.node if n.op_type == "Pad" or (n.op_type == "Resize" and b"linear" in mode(n))]
    assert len(views) == 4  # two views are scaled and padded
    assert {known[node.output[0]] for node in views} == {onnx.TensorProto.FLOAT}
    assert all(tensor.dtype == "float16" for tensor in half.spec.outputs)
    assert all(output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 for output in half.model.graph.output)
    assert half.spec.precision == "fp16"
    assert len(serialized(half.model)) < 0.75 * len(serialized(finished_float(half)))


def mode(node: onnx.NodeProto) -> bytes:
    return next(bytes(a.s) for a in node.attribute if a.name == "mode")


def finished_float(half: Graph) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(half.model)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
            )
    return model


def test_the_graph_converted_from_is_left_as_it_was(plain: Graph, half: Graph) -> None:
    assert all(tensor.data_type != onnx.TensorProto.FLOAT16 for tensor in plain.model.graph.initializer)
    assert half.model is not plain.model


def heads(graph: Graph, canvases: NDArray[np.uint8]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(serialized(graph.model), providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, {"images": canvases})]


def test_it_computes_what_the_float_graph_computes(network: Yolov5, plain: Graph, half: Graph) -> None:
    canvases = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    emulated, overflowed = half_infer(network, tta=True)
    for exact, stored, as_engine in zip(heads(plain, canvases), heads(half, canvases), emulated(canvases), strict=True):
        # Raw heads of magnitude 4: a float16 step is 1/256 there, and errors of the body add to it.
        assert np.abs(stored.astype(np.float32) - exact).max() < 0.02
        assert 0 < np.abs(as_engine - exact).max() < 0.02
    assert overflowed == []


def test_weights_beyond_float16_are_named(network: Yolov5, plain: Graph) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(plain.model)
    weight = next(t for t in model.graph.initializer if t.name == "network.model.3.conv.weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0, 0, 0] = 7e4
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    with pytest.raises(GateError, match=r"cannot hold 1 of the weights: model\.3\.conv\.weight \(7e\+04\)"):
        finished(network, dataclasses.replace(plain, model=model), OPTIONS)
    values[0, 0, 0, 0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    with pytest.raises(GateError, match=r"model\.3\.conv\.weight \(nan\)"):
        finished(network, dataclasses.replace(plain, model=model), OPTIONS)


def test_weights_below_float16s_normal_numbers_are_named(network: Yolov5, plain: Graph) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(plain.model)
    weight = next(t for t in model.graph.initializer if t.name == "network.model.5.conv.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1e-6), weight.name))
    found = finished(network, dataclasses.replace(plain, model=model), OPTIONS).findings
    assert len(found) == 1
    assert found[0].startswith("model.5.conv.weight loses")


def test_values_beyond_float16_are_traced_to_their_layer(network: Yolov5) -> None:
    large = copy.deepcopy(network)
    with torch.no_grad():
        conv = large.model[3]
        conv.bn.weight.mul_(1e5)  # type: ignore[union-attr, operator]
    with half_contender(large, tta=False) as contender:
        contender.infer(np.full((1, 64, 96, 3), 200, np.uint8))
        assert contender.overflowed is not None
        assert contender.overflowed() == ["model.3"]
    assert np.isfinite(reference_heads(large)(np.full((1, 64, 96, 3), 200, np.uint8))[0]).all()
