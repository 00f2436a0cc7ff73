"""Faults planted in heads, in the network, in the views and in what an artifact says of itself: each is found."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from parkdet.export.canvases import GateImage
from parkdet.export.config import GraphOptions
from parkdet.export.contenders import session_contender
from parkdet.export.graph import GraphSource, float_graph
from parkdet.export.matching import Outputs
from parkdet.export.parity import Contender, compare, reference_heads
from parkdet.runtime.geometry import ImageArray
from parkdet.runtime.views import TTA_VIEWS
from parkdet.train.model.network import Yolov5
from tests.export.gate import CANVAS, drawn, judged


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


def exchanged_batch(heads: list[Any]) -> list[Any]:
    return [head[::-1] for head in heads]


def levels_in_another_order(heads: list[Any]) -> list[Any]:
    return heads[::-1]


def level_missing(heads: list[Any]) -> list[Any]:
    return heads[:1]


def of_the_first_image(heads: list[Any]) -> list[Any]:
    return [head[:1] for head in heads]


def transposed_cells(heads: list[Any]) -> list[Any]:
    return [head.swapaxes(2, 3) for head in heads]


def dead_column(heads: list[Any]) -> list[Any]:
    broken = [head.copy() for head in heads]
    broken[0][:, :, :, -1] = -20.0
    return broken


FAULTS = [
    swapped_anchor, shifted_box, lower_scores, rolled_class, not_finite, exchanged_batch, levels_in_another_order,
    level_missing, of_the_first_image, transposed_cells, dead_column,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_the_heads_is_found(network: Yolov5, fault: Callable[[list[Any]], list[Any]]) -> None:
    heads = reference_heads(network)

    def faulty(canvases: ImageArray) -> Outputs:
        return fault([np.asarray(head) for head in heads(canvases)])

    assert judged(network, faulty, drawn(network, 2, CANVAS)).findings() != []


def test_boxes_of_another_number_are_found(network: Yolov5) -> None:
    graph = float_graph(network, GraphOptions(head="decoded", canvas_hw=CANVAS))
    with session_contender(network, graph, "it") as sound:
        images = drawn(network, 2, CANVAS)
        for part in (np.s_[:, :-1], np.s_[:1], np.s_[..., :-1]):

            def faulty_boxes(canvases: ImageArray, part: Any = part) -> Outputs:
                return [sound.infer(canvases)[0][part]]

            faulty = dataclasses.replace(sound, infer=faulty_boxes)
            (report,) = compare(network, [nullcontext(faulty)], images)
            assert any("its outputs are [(" in finding for finding in report.findings())


def test_a_canvas_padded_with_128_is_found(network: Yolov5) -> None:
    heads = reference_heads(network)

    def other_padding(canvases: ImageArray) -> Outputs:
        return heads(np.where((canvases == 114).all(-1, keepdims=True), np.uint8(128), canvases))

    assert judged(network, other_padding, drawn(network, 2)).findings() != []


def bilinear_upsampling(source: GraphSource) -> None:
    for module in source.network.modules():
        if isinstance(module, torch.nn.Upsample):
            module.mode = "bilinear"


def rgb_for_bgr(source: GraphSource) -> None:
    weight = source.network.first_conv.weight
    weight.copy_(weight.flip(1))


def not_scaled(source: GraphSource) -> None:
    source.network.first_conv.weight.mul_(255)


def scaled_by_256(source: GraphSource) -> None:
    source.network.first_conv.weight.mul_(255 / 256)


def one_bias_lost(source: GraphSource) -> None:
    source.network.get_parameter("model.3.conv.bias").zero_()


def levels_exchanged(source: GraphSource) -> None:
    weight = source.network.head_convs[0].weight
    weight.copy_(weight.roll(8, 0))


@pytest.mark.parametrize(
    "fault", [bilinear_upsampling, rgb_for_bgr, not_scaled, scaled_by_256, one_bias_lost, levels_exchanged]
)
def test_a_planted_fault_in_the_network_is_found(network: Yolov5, fault: Callable[[GraphSource], None]) -> None:
    source = GraphSource(network, GraphOptions(input_format="float-nchw"))
    sound = [nullcontext(Contender("it", "fp32", reference_heads(source.network), network.spec))]
    images = drawn(network, 2, CANVAS)
    assert compare(network, sound, images)[0].findings() == []
    with torch.no_grad():
        fault(source)
    assert compare(network, sound, images)[0].findings() != []


@pytest.mark.parametrize(
    "changed",
    [
        {"class_names": ("b", "a", "c")},
        {"strides": (16, 32)},
        {"anchors": (((10.0, 13.0), (16.0, 30.0), (33.0, 24.0)), ((30.0, 61.0), (62.0, 45.0), (59.0, 119.0)))},
        {"category_ids": (1, 3, 2)},
        {"imgsz": 640},
        {"conf": 0.3},
    ],
)
def test_an_artifact_that_describes_itself_otherwise_is_found(network: Yolov5, changed: dict[str, Any]) -> None:
    spec = dataclasses.replace(network.spec, **changed)
    blank = [GateImage(np.full((*CANVAS, 3), 114, np.uint8))]
    contender = Contender("it", "fp32", reference_heads(network), spec)
    (found,) = compare(network, [nullcontext(contender)], blank)
    (name,) = changed
    assert any(f"its model spec has {name}" in finding for finding in found.findings())


def aligned_corners(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.nn.functional.interpolate

    def aligned(*arguments: Any, **named: Any) -> Any:
        return right(*arguments, **(named | ({"align_corners": True} if named.get("mode") == "bilinear" else {})))

    monkeypatch.setattr(torch.nn.functional, "interpolate", aligned)


def not_mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    from parkdet.train.model import tta

    monkeypatch.setattr(tta, "TTA_VIEWS", tuple(dataclasses.replace(view, mirrored=False) for view in TTA_VIEWS))


@pytest.mark.parametrize("fault", [aligned_corners, not_mirrored])
def test_views_made_otherwise_are_found(
    network: Yolov5, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    with monkeypatch.context() as planted:
        fault(planted)
        graph = float_graph(network, GraphOptions(tta=True, canvas_hw=CANVAS))
    (found,) = compare(network, [session_contender(network, graph, "it")], drawn(network, 2, CANVAS), tta=True)
    assert found.findings() != []


def test_int8_that_detects_nothing_is_not_proven(network: Yolov5) -> None:
    blank = [GateImage(np.full((*CANVAS, 3), 114, np.uint8))]
    silent = copy.deepcopy(network)
    with torch.no_grad():
        for conv in silent.head_convs:
            conv.weight.zero_()
            conv.bias.fill_(-20.0)  # type: ignore[union-attr]
    found = judged(silent, reference_heads(silent), blank, "int8")
    assert found.detections == 0
    assert any("nothing is proven" in finding for finding in found.findings())
    assert judged(silent, reference_heads(silent), blank).findings() == []
