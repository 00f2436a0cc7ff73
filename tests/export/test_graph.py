"""The exported graph against torch through ONNX Runtime, and the gate that refuses what differs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from parkdet.export.canvases import generated_canvases
from parkdet.export.config import ExportOptions, GraphOptions
from parkdet.export.exporter import export_onnx
from parkdet.export.graph import build_graph
from parkdet.export.parity import LIMITS, Side, compare, pair, torch_heads
from parkdet.runtime import ModelSpec
from parkdet.runtime.backends.base import open_backend
from parkdet.runtime.errors import GateError, UsageError
from parkdet.runtime.model_spec import SPEC_KEY
from parkdet.runtime.nms import RankedCandidates
from parkdet.train import save_checkpoint
from parkdet.train.model.network import Yolov5


@pytest.fixture(scope="module")
def graph(network: Yolov5) -> onnx.ModelProto:
    return build_graph(network, GraphOptions())


def run(model: onnx.ModelProto, canvases: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"images": canvases}))


@pytest.mark.parametrize("shape", [(1, 32, 32, 3), (2, 192, 256, 3), (3, 320, 128, 3)])
def test_one_graph_serves_every_canvas_and_batch(
    network: Yolov5, graph: onnx.ModelProto, shape: tuple[int, ...]
) -> None:
    canvases = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    rgb = torch.from_numpy(canvases[..., ::-1].transpose(0, 3, 1, 2).copy()).float() / 255
    with torch.no_grad():
        expected = network(rgb)
    for head, ours in zip(expected, run(graph, canvases), strict=True):
        np.testing.assert_allclose(ours, head.numpy(), rtol=1e-3, atol=1e-3)


def test_the_contract(network: Yolov5, graph: onnx.ModelProto) -> None:
    onnx.checker.check_model(graph, full_check=True)
    assert [entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")] == [20]
    (images,) = graph.graph.input
    assert images.name == "images"
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    operators = [node.op_type for node in graph.graph.node]
    assert "BatchNormalization" not in operators
    assert operators.index("Cast") < operators.index("Transpose")
    assert all(output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for output in graph.graph.output)
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    spec = ModelSpec.from_json(metadata[SPEC_KEY], "graph")
    assert (spec.class_names, spec.strides, spec.anchors) == (
        network.spec.class_names,
        network.spec.strides,
        network.spec.anchors,
    )
    assert [tensor.name for tensor in spec.outputs] == [output.name for output in graph.graph.output]
    # Nothing of the machine that exported is in the file.
    assert b"site-packages" not in graph.SerializeToString()


def test_a_fixed_canvas_and_batch(network: Yolov5) -> None:
    model = build_graph(network, GraphOptions(canvas_hw=(128, 192), batch=2))
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == [2, 128, 192, 3]
    assert not any(node.op_type == "Shape" for node in model.graph.node)
    with pytest.raises(UsageError, match="multiple of 32"):
        build_graph(network, GraphOptions(canvas_hw=(100, 128), batch=1))


def test_equal_heads_pass_the_gate(network: Yolov5) -> None:
    report = compare(network, torch_heads(network), generated_canvases(network.spec, None, count=3))
    assert report.detections > 20
    assert report.findings(LIMITS["fp32"]) == []
    assert (report.unmatched, report.iou_min, report.score_max, report.ap75) == (0, 1, 0, 1)


def swapped_anchor(heads: list[Any]) -> list[Any]:
    return [head[:, ::-1] for head in heads]


def shifted_box(heads: list[Any]) -> list[Any]:
    moved = [head.copy() for head in heads]
    for head in moved:
        head[..., 0] += 0.05
    return moved


def lower_scores(heads: list[Any]) -> list[Any]:
    lowered = [head.copy() for head in heads]
    for head in lowered:
        head[..., 4] -= 0.05
    return lowered


def rolled_class(heads: list[Any]) -> list[Any]:
    return [np.concatenate((head[..., :5], np.roll(head[..., 5:], 1, -1)), -1) for head in heads]


def not_finite(heads: list[Any]) -> list[Any]:
    broken = [head.copy() for head in heads]
    broken[0][0, 0, 0, 0, 0] = np.nan
    return broken


@pytest.mark.parametrize("fault", [swapped_anchor, shifted_box, lower_scores, rolled_class, not_finite])
def test_a_planted_fault_is_found(network: Yolov5, fault: Callable[[list[Any]], list[Any]]) -> None:
    heads = torch_heads(network)

    def faulty(canvases: np.ndarray[Any, Any]) -> Sequence[Any]:
        return fault([np.asarray(head) for head in heads(canvases)])

    report = compare(network, faulty, generated_canvases(network.spec, None, count=2))
    assert report.findings(LIMITS["fp32"]) != []


def test_the_file_bears_its_name_only_after_the_gate(
    network: Yolov5, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "best.pt"
    save_checkpoint(weights, network)
    said: list[str] = []
    path = export_onnx(ExportOptions(weights=weights, graph=GraphOptions(canvas_hw=(192, 320))), said.append)
    assert path == tmp_path / "best.onnx"
    assert json.loads((tmp_path / "best.onnx.parity.json").read_text())["passed"]
    assert any("drawn images" in line for line in said)
    before = path.read_bytes()
    with open_backend(path) as backend:
        assert len(backend.spec.checkpoint_sha256) == 64

    from parkdet.export import graph as graph_module

    class Unswapped(graph_module.GraphSource):
        """Takes RGB where the contract says BGR."""

        def __init__(self, network: Yolov5, options: GraphOptions):
            super().__init__(network, options)
            with torch.no_grad():
                first = self.network.first_conv.weight
                first.copy_(first.flip(1))

    monkeypatch.setattr(graph_module, "GraphSource", Unswapped)
    with pytest.raises(GateError, match=r"not the checkpoint's.*best\.onnx\.rejected"):
        export_onnx(ExportOptions(weights=weights, graph=GraphOptions(canvas_hw=(192, 320))), said.append)
    assert path.read_bytes() == before
    assert (tmp_path / "best.onnx.rejected").exists()
    assert not json.loads((tmp_path / "best.onnx.rejected.parity.json").read_text())["passed"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.onnx", "best.onnx.parity.json", "best.onnx.rejected", "best.onnx.rejected.parity.json", "best.pt",
    ]  # fmt: skip


def side(keys: list[int], boxes: list[list[float]], scores: list[float], kept: list[int]) -> Side:
    ranked = RankedCandidates(
        xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores, np.float32),
        class_ids=np.array(keys, np.int32) % 3,
        keys=np.array(keys, np.int64),
        found=len(keys),
    )
    return Side(ranked, np.array(kept, np.int64))


BOX, NEAR, FAR = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 10.5], [5.0, 5.0, 15.0, 15.0]


def test_partners_are_the_same_output_and_overlap() -> None:
    none = side([], [], [], [])
    assert len(pair(none, none).wanted) == 0
    found = pair(side([4, 7], [BOX, FAR], [0.9, 0.8], [0, 1]), side([7, 4], [FAR, NEAR], [0.9, 0.8], [0, 1]))
    assert sorted(zip(found.wanted.tolist(), found.found.tolist(), strict=True)) == [(0, 1), (1, 0)]
    assert found.reordered == 0


def test_a_moved_box_or_a_missing_output_is_unmatched() -> None:
    moved = pair(side([4], [BOX], [0.9], [0]), side([4], [FAR], [0.9], [0]))
    assert (moved.unmatched_wanted.tolist(), moved.unmatched_found.tolist()) == ([0], [0])
    missing = pair(side([4], [BOX], [0.9], [0]), side([5], [BOX], [0.9], [0]))
    assert (len(missing.unmatched_wanted), len(missing.unmatched_found)) == (1, 1)
    low = pair(side([4], [BOX], [0.09], [0]), side([], [], [], []))
    assert len(low.unmatched_wanted) == 0


def test_a_near_tie_that_nms_decides_the_other_way_is_compared_all_the_same() -> None:
    wanted = side([4, 7], [BOX, NEAR], [0.800001, 0.8], [0])
    found = side([7, 4], [NEAR, BOX], [0.800001, 0.8], [0])
    result = pair(wanted, found)
    assert (result.reordered, len(result.unmatched_wanted), len(result.unmatched_found)) == (2, 0, 0)
    assert len(result.wanted) == 2
