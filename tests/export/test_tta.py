"""One graph that makes the three views: against torch's own and against what the reference computed."""

from __future__ import annotations

import dataclasses
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
from parkdet.export.graph import build_graph
from parkdet.runtime import decode_heads, non_max_suppression
from parkdet.train import forward_tta, load_checkpoint
from parkdet.train.model.network import Yolov5


def heads_of(graph: onnx.ModelProto, canvases: NDArray[np.uint8]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"images": canvases}))


@pytest.fixture(scope="module")
def graph(network: Yolov5) -> onnx.ModelProto:
    return build_graph(network, GraphOptions(tta=True, canvas_hw=(96, 160))).model


def canvases_and_boxes(network: Yolov5, canvas_hw: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    canvases = np.random.default_rng(0).integers(0, 256, (2, *canvas_hw, 3), dtype=np.uint8)
    rgb = torch.from_numpy(canvases[..., ::-1].transpose(0, 3, 1, 2).copy()).float() / 255
    return canvases, forward_tta(network, rgb).numpy()


def test_the_graphs_views_are_torchs(network: Yolov5, graph: onnx.ModelProto) -> None:
    canvases, expected = canvases_and_boxes(network, (96, 160))
    spec = dataclasses.replace(network.spec, tta=True)
    np.testing.assert_allclose(decode_heads(heads_of(graph, canvases), spec), expected, rtol=1e-3, atol=1e-3)
    compiled = openvino.compile_model(
        openvino.Core().read_model(graph.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    found = compiled({"images": canvases})
    theirs = [found[output.name] for output in graph.graph.output]
    np.testing.assert_allclose(decode_heads(theirs, spec), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_one_graph_serves_every_canvas(network: Yolov5) -> None:
    graph = build_graph(network, GraphOptions(tta=True)).model
    for canvas_hw in ((32, 32), (96, 160), (320, 224)):
        canvases, expected = canvases_and_boxes(network, canvas_hw)
        decoded = decode_heads(heads_of(graph, canvases), dataclasses.replace(network.spec, tta=True))
        np.testing.assert_allclose(decoded, expected, rtol=1e-3, atol=1e-3)


def test_dropped_levels_are_not_computed(network: Yolov5, graph: onnx.ModelProto) -> None:
    operators = [node.op_type for node in graph.graph.node]
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())
    # View 0 needs neither the way down to the coarsest level (a convolution, a C3) nor its head; view 2 all but the
    # finest head.
    c3 = sum(isinstance(module, torch.nn.Conv2d) for module in network.model[-2].modules())
    assert operators.count("Conv") == 3 * convolutions - (1 + c3 + 1) - 1
    assert [output.name for output in graph.graph.output] == [
        "view0_head0", "view1_head0", "view1_head1", "view2_head1",
    ]  # fmt: skip


def test_the_views_share_their_weights(graph: onnx.ModelProto) -> None:
    kernels = [tensor.name for tensor in graph.graph.initializer if len(tensor.dims) == 4]
    readers = [node.input[1] for node in graph.graph.node if node.op_type == "Conv"]
    assert sorted(set(readers)) == sorted(kernels)
    assert max(map(readers.count, kernels)) == 3


@pytest.mark.slow
def test_what_the_reference_computed(shared: Path) -> None:
    fixture = np.load(shared / "fixtures" / "yolov5n6_nc14_official.npz")
    model = load_checkpoint(shared / "fixtures" / "yolov5n6_nc14_official.pt").model
    canvases = np.ascontiguousarray(fixture["x_uint8"].transpose(0, 2, 3, 1)[..., ::-1])
    graph = build_graph(model, GraphOptions(tta=True, canvas_hw=(192, 256))).model
    decoded = decode_heads(heads_of(graph, canvases), dataclasses.replace(model.spec, tta=True))
    expected = fixture["tta"]
    assert (np.abs(decoded - expected) <= 1e-4 + 1e-3 * np.abs(expected)).all()
    for image in range(2):
        survivors = non_max_suppression(decoded[image])
        wanted = fixture[f"nms_tta_img{image}"]
        assert survivors.class_ids.tolist() == wanted[:, 5].astype(int).tolist()
        np.testing.assert_allclose(survivors.xyxy, wanted[:, :4], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(survivors.scores, wanted[:, 4], rtol=1e-3, atol=1e-4)
