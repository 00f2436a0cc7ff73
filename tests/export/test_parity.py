"""The gate: partners, figures, planted faults, and what is left on the disk when it refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from parkdet.export import decode as decode_module
from parkdet.export import exporter, report
from parkdet.export import graph as graph_module
from parkdet.export.canvases import GateImage
from parkdet.export.config import ExportOptions, GraphOptions
from parkdet.export.contenders import runs_in_bf16, session_contender
from parkdet.export.graph import Graph, finished, float_graph
from parkdet.export.matching import FLOOR, Outputs, Side, pair
from parkdet.export.parity import compare, reference_heads
from parkdet.export.plugin_node import candidates_by_attributes, with_plugin, without_plugin
from parkdet.runtime.backends.base import open_backend
from parkdet.runtime.errors import GateError, ParkdetError
from parkdet.runtime.geometry import ImageArray
from parkdet.runtime.heads import decode_candidates
from parkdet.runtime.nms import RankedCandidates
from parkdet.runtime.shards import write_atomically
from parkdet.train import save_checkpoint
from parkdet.train.model.network import Yolov5
from tests.export.gate import CANVAS, drawn, judged


def test_equal_heads_pass_the_gate(network: Yolov5) -> None:
    found = judged(network, reference_heads(network), drawn(network, 3))
    assert found.detections > 20
    assert found.findings() == []
    assert (found.unmatched, round(found.iou_min, 6), found.agreement.ap75, found.reverse.ap75) == (0, 1, 1, 1)
    assert set(found.agreement.per_class) <= set(network.spec.class_names)
    assert all(ap == 1 for ap in found.agreement.per_class.values())


def test_boxes_decoded_in_float16_are_found(network: Yolov5, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = decode_module._decoded

    def in_half(raw: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return right(raw, *arguments).half().float()

    options = GraphOptions(canvas_hw=CANVAS, head="decoded", precision="fp16")
    (sound,) = compare(
        network,
        [session_contender(network, finished(network, float_graph(network, options), options), "it")],
        drawn(network, 2, CANVAS),
    )
    assert sound.findings() == []
    assert sound.decode_error < 1e-3
    monkeypatch.setattr(decode_module, "_decoded", in_half)
    with pytest.raises(GateError, match="not decoded in float32"):
        exporter.export_onnx(ExportOptions(weights=weights, graph=options), lambda _: None)
    assert (weights.parent / "best.decoded.fp16.onnx.rejected").exists()
    assert not (weights.parent / "best.decoded.fp16.onnx").exists()


def test_views_padded_with_128_are_found(network: Yolov5, monkeypatch: pytest.MonkeyPatch) -> None:
    from parkdet.train.model import tta

    images = drawn(network, 4, CANVAS)
    with monkeypatch.context() as planted:
        planted.setattr(tta, "VIEW_PAD", 128 / 255)
        graph = float_graph(network, GraphOptions(tta=True, canvas_hw=CANVAS))
    (found,) = compare(network, [session_contender(network, graph, "it")], images, tta=True)
    assert found.findings() != []


@pytest.fixture(scope="module")
def plugin(network: Yolov5) -> Graph:
    return finished(
        network, float_graph(network, options := GraphOptions(tta=True, canvas_hw=CANVAS, head="plugin")), options
    )


def test_the_plugins_node_says_what_the_spec_says(network: Yolov5, plugin: Graph) -> None:
    images = drawn(network, 2, CANVAS)
    (found,) = compare(network, [session_contender(network, plugin, "it")], images, tta=True)
    assert found.findings() == []
    with session_contender(network, plugin, "it") as contender:
        outputs = contender.infer(np.stack([image.canvas for image in images]))
    _, node = without_plugin(plugin.model)
    spec = dataclasses.replace(network.spec, tta=True)
    for ours, expected in zip(
        candidates_by_attributes(node, list(outputs), FLOOR), decode_candidates(outputs, spec, FLOOR), strict=True
    ):
        assert np.array_equal(ours.anchor_index, expected.anchor_index)
        np.testing.assert_allclose(ours.decoded, expected.decoded, rtol=1e-6)
    assert [(o.name, o.dtype) for o in plugin.spec.outputs] == [
        ("num_dets", "int32"), ("boxes", "float32"), ("scores", "float32"), ("classes", "int32"),
    ]  # fmt: skip
    assert (node.op_type, node.domain, node.input[0]) == ("ParkdetNMS", "parkdet", "view0_head0")


@pytest.mark.parametrize("attribute", ["anchors", "strides", "view_flips", "view_scales"])
def test_a_wrong_attribute_of_the_plugins_node_is_found(network: Yolov5, plugin: Graph, attribute: str) -> None:
    raw, _ = without_plugin(plugin.model)
    model, _ = with_plugin(raw, dataclasses.replace(plugin.spec, head="raw", outputs=plugin.spec.outputs))
    (wrong,) = [a for a in model.graph.node[-1].attribute if a.name == attribute]
    values = wrong.floats or wrong.ints
    values[0], values[-1] = (values[-1], values[0]) if values[0] != values[-1] else (1 - values[0], values[-1])
    (found,) = compare(
        network, [session_contender(network, Graph(model, plugin.spec), "it")], drawn(network, 2, CANVAS), tta=True
    )
    assert found.findings() != []


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("conf", 0.02), ("iou", 0.69), ("max_det", 49), ("max_candidates", 3840), ("multi_label", 0), ("agnostic", 1)],
)
def test_post_processing_that_the_plugins_node_has_otherwise_is_found(
    network: Yolov5, plugin: Graph, attribute: str, value: float
) -> None:
    model = copy.deepcopy(plugin.model)
    (wrong,) = [a for a in model.graph.node[-1].attribute if a.name == attribute]
    if isinstance(value, int):
        wrong.i = value
    else:
        wrong.f = value
    graph = Graph(model, plugin.spec)
    (found,) = compare(network, [session_contender(network, graph, "it")], drawn(network, 2, CANVAS), tta=True)
    assert any(f"the plugin's node has {attribute} " in finding for finding in found.findings())


def labelled(network: Yolov5, count: int) -> list[GateImage]:
    """Canvases whose labels are what the checkpoint itself finds."""
    images = []
    for image in drawn(network, count, CANVAS):
        heads = reference_heads(network)(image.canvas[None])
        side = Side.of(decode_candidates(heads, network.spec, FLOOR)[0])
        best = side.kept[:20]
        images.append(GateImage(image.canvas, (side.ranked.xyxy[best], side.ranked.class_ids[best].astype(np.int64))))
    return images


def test_accuracy_lost_against_labels_is_found(network: Yolov5) -> None:
    images = labelled(network, 4)
    heads = reference_heads(network)
    assert judged(network, heads, images).map_lost == pytest.approx(0, abs=1e-9)

    def worse(canvases: ImageArray) -> Outputs:
        noise = np.random.default_rng(0)
        return [np.asarray(h) + noise.normal(0, 0.5, np.asarray(h).shape).astype(np.float32) for h in heads(canvases)]

    found = judged(network, worse, images, "int8")
    assert found.map_lost > 0.005
    assert any("mAP@[.5:.95] falls" in finding for finding in found.findings())


@pytest.fixture
def weights(network: Yolov5, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "best.pt", network)
    return tmp_path / "best.pt"


def test_images_that_cannot_be_read_are_told(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b"):
        cv2.imwrite(str(folder / f"{name}.png"), np.full((36, 64, 3), 90, np.uint8))
    (folder / "c.jpg").write_bytes(b"junk")
    said: list[str] = []
    options = ExportOptions(weights=weights, calibration=folder, graph=GraphOptions(canvas_hw=CANVAS))
    exporter.export_onnx(options, said.append)
    assert f"gate: 2 images of {folder}" in said
    assert "warning: 1 of 3 images could not be read and were left out" in said


def test_the_file_bears_its_name_only_after_the_gate(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = weights.parent
    said: list[str] = []
    options = ExportOptions(weights=weights, graph=GraphOptions(canvas_hw=CANVAS))
    path = exporter.export_onnx(options, said.append)
    assert path == folder / "best.onnx"
    written = json.loads((folder / "best.onnx.parity.json").read_text())
    assert written["passed"]
    compared, *as_infer_runs_it = written["compared"]
    assert [one["precision"] for one in as_infer_runs_it] == (["bf16"] if runs_in_bf16() else [])
    assert compared["agreement"]["ap75"] == 1
    assert set(compared["agreement"]["per_class"]) <= {"a", "b", "c"}
    text = (folder / "best.onnx.parity.txt").read_text()
    assert "passed" in text
    assert "within its limits" in text
    assert any("drawn images" in line for line in [*said, text])
    before = path.read_bytes()
    with open_backend(path) as backend:
        assert len(backend.spec.checkpoint_sha256) == 64

    class Unswapped(graph_module.GraphSource):
        """Takes RGB where the contract says BGR."""

        def __init__(self, network: Yolov5, options: GraphOptions):
            super().__init__(network, options)
            with torch.no_grad():
                first = self.network.first_conv.weight
                first.copy_(first.flip(1))

    monkeypatch.setattr(graph_module, "GraphSource", Unswapped)
    with pytest.raises(GateError, match=r"not what the checkpoint is.*best\.onnx\.rejected") as refusal:
        exporter.export_onnx(options, said.append)
    assert refusal.value.exit_code == 3
    assert path.read_bytes() == before
    assert not json.loads((folder / "best.onnx.rejected.parity.json").read_text())["passed"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "best.onnx", "best.onnx.parity.json", "best.onnx.parity.txt", "best.onnx.rejected",
        "best.onnx.rejected.parity.json", "best.onnx.rejected.parity.txt", "best.pt",
    ]  # fmt: skip


PASSED = report.GateResult(artifact="a", checkpoint="b", source="c", reports=(), findings=())


def test_a_report_that_cannot_be_written_leaves_the_older_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, pending = tmp_path / "best.onnx", tmp_path / ".best.pending.onnx"
    for path in (output, *report.paths(output)):
        path.write_bytes(b"old")
    pending.write_bytes(b"new")

    def full(path: Path, content: bytes) -> None:
        if path.suffix == ".txt":
            raise ParkdetError(f"{path}: cannot be written (No space left on device)")
        write_atomically(path, content)

    with monkeypatch.context() as planted:
        planted.setattr(report, "write_atomically", full)
        with pytest.raises(ParkdetError, match="No space left"):
            exporter.settle(pending, output, PASSED)
    assert {path.read_bytes() for path in (output, *report.paths(output))} == {b"old"}
    assert len(list(tmp_path.iterdir())) == 4
    exporter.settle(pending, output, PASSED)
    assert output.read_bytes() == b"new"
    assert json.loads(report.paths(output)[0].read_text())["passed"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for name, content in (("best_int8", "old"), (".pending", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.xml").write_text(content)
    exporter.settle(tmp_path / ".pending", tmp_path / "best_int8", PASSED)
    assert (tmp_path / "best_int8" / "model.xml").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best_int8", "best_int8.parity.json", "best_int8.parity.txt",
    ]  # fmt: skip


def test_a_report_without_detections_holds_no_nan(network: Yolov5) -> None:
    blank = [GateImage(np.full((*CANVAS, 3), 114, np.uint8))]
    silent = [np.full_like(head, -20) for head in reference_heads(network)(blank[0].canvas[None])]
    found = judged(network, lambda _: silent, blank)
    json.dumps(report.as_dict(found), allow_nan=False)
    result = report.GateResult(artifact="a", checkpoint="b", source="c", reports=(found,), findings=())
    assert "nan" not in report.as_text(result)


def test_the_folder_of_a_data_set_brings_its_labels(network: Yolov5, tmp_path: Path) -> None:
    from parkdet.export.canvases import gate_source

    images, label = tmp_path / "train" / "images", tmp_path / "train" / "label"
    images.mkdir(parents=True)
    label.mkdir()
    cv2.imwrite(str(images / "1.png"), np.full((50, 100, 3), 9, np.uint8))
    truth = {
        "images": [{"id": 7, "file_name": "1.png", "width": 100, "height": 50}],
        "categories": [{"id": i, "name": n} for i, n in zip((1, 2, 3), "abc", strict=True)],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 2, "bbox": [10, 20, 30, 20], "area": 600, "iscrowd": 0}
        ],
    }
    (label / "Train.json").write_text(json.dumps(truth))
    (image,) = gate_source(images, None, network.spec).images(network.spec, None)
    assert image.labels is not None
    # 100 x 50 at 320: scaled by 3.2 onto a canvas of 176 x 336, 8 pixels of padding on each side.
    np.testing.assert_allclose(image.labels[0], [[40, 72, 136, 136]], atol=1e-4)
    assert image.labels[1].tolist() == [1]
    assert gate_source(tmp_path, None, network.spec).labels == {}


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
