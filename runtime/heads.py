"""From the network's raw heads to boxes: the first implementation of the specification's 'Heads'.

Shapes: B images, na anchors a cell, h x w cells, nc classes, N = sum of na * h * w over the heads. There is a head a
level; with test-time augmentation (`spec.tta`) one a view and kept level, in the order of `views.head_sources`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.geometry import FloatArray
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.views import TTA_VIEWS, HeadSource, View, head_sources, heads_of_first_views

RawHead = NDArray[np.floating[Any]]
"""One level's raw output of one view, (B, na, h, w, 5 + nc): x, y, w, h, objectness, classes before the sigmoid."""


def sigmoid(raw: NDArray[np.floating[Any]]) -> FloatArray:
    """1 / (1 + exp(-raw)) in float32, in a new array, without overflow at either end."""
    values: FloatArray = np.negative(raw, dtype=np.float32)
    # exp of a large positive number is infinity and 1 / infinity is the right 0; nothing to warn of.
    with np.errstate(over="ignore"):
        np.exp(values, out=values)
    values += 1
    return np.divide(1, values, out=values)


def check_heads(heads: Sequence[RawHead], spec: ModelSpec) -> None:
    """ValueError unless the heads are those of the spec, each (B, na, h, w, 5 + nc) with the same B.

    Of a test-time graph those of its first view or two are heads, too: a cheaper augmentation.
    """
    sources = _sources_of(heads, spec)
    if len(heads) != len(sources):
        of_views = f" in {len(TTA_VIEWS)} test-time views" if spec.tta else ""
        raise ValueError(
            f"{len(heads)} heads do not go with the {len(spec.strides)} levels of the model spec{of_views}"
        )
    for index, head in enumerate(heads):
        expected = (heads[0].shape[0], spec.anchors_per_cell, spec.num_outputs)
        if head.ndim != 5 or (head.shape[0], head.shape[1], head.shape[4]) != expected:
            raise ValueError(f"head {index} is {head.shape}, not ({expected[0]}, {expected[1]}, h, w, {expected[2]})")
    if not spec.tta:
        return
    canvas_hw = canvas_of_heads(heads, spec)
    for source, head in zip(sources, heads, strict=True):
        stride = spec.strides[source.level]
        cells = tuple(source.view.padded(side, spec.stride_max) // stride for side in canvas_hw)
        if head.shape[2:4] != cells:
            raise ValueError(
                f"{source.name} has {head.shape[2]} x {head.shape[3]} cells; of a canvas of {canvas_hw[0]} x "
                f"{canvas_hw[1]} it has {cells[0]} x {cells[1]}"
            )


def _sources_of(heads: Sequence[RawHead], spec: ModelSpec) -> tuple[HeadSource, ...]:
    sources = head_sources(len(spec.strides), spec.tta)
    whole = [heads_of_first_views(len(spec.strides), views) for views in range(1, len(TTA_VIEWS) + 1)]
    return sources[: len(heads)] if spec.tta and len(heads) in whole else sources


def canvas_of_heads(heads: Sequence[RawHead], spec: ModelSpec) -> tuple[int, int]:
    """Height and width in pixels of the canvas that heads come from: the first one is the full view's finest."""
    return heads[0].shape[2] * spec.strides[0], heads[0].shape[3] * spec.strides[0]


def decode_heads(heads: Sequence[RawHead], spec: ModelSpec) -> FloatArray:
    """Decode raw heads to (B, N, 5 + nc) float32: cx, cy, w, h in canvas pixels, objectness, class scores.

    The order is view (with `spec.tta`), level, anchor, row, column. ValueError where the heads do not fit the spec.
    Source: the YOLOv5 v6 Detect layer; the formulas stand in the project's specification.
    """
    arrays = [np.asarray(head) for head in heads]
    check_heads(arrays, spec)
    decoded = []
    for head, geometry in zip(arrays, geometries(arrays, spec), strict=True):
        batch, anchors, rows, columns, channels = head.shape
        values = sigmoid(head)
        flat = values.reshape(batch, -1, channels)
        decode_boxes(flat, np.arange(anchors * rows * columns), geometry)
        decoded.append(flat)
    return np.concatenate(decoded, axis=1)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Anchors of one image whose objectness passes, in decoded order."""

    decoded: FloatArray
    """(K, 5 + nc): rows of what `decode_heads` gives."""
    anchor_index: NDArray[np.int64]
    """(K,): the row of each in the full decoded array."""


def decode_candidates(heads: Sequence[RawHead], spec: ModelSpec, conf: float) -> list[Candidates]:
    """Only the anchors with objectness > conf, an image each: the same numbers as `decode_heads`, far fewer.

    ValueError where the heads do not fit the spec.
    """
    arrays = [np.asarray(head) for head in heads]
    check_heads(arrays, spec)
    batch = arrays[0].shape[0]
    parts: list[list[Candidates]] = [[] for _ in range(batch)]
    first = 0
    for head, geometry in zip(arrays, geometries(arrays, spec), strict=True):
        _, anchors, rows, columns, channels = head.shape
        flat = head.reshape(batch, -1, channels)
        for image in range(batch):
            index = np.flatnonzero(sigmoid(flat[image, :, 4]) > np.float32(conf))
            values = sigmoid(flat[image, index])
            decode_boxes(values, index, geometry)
            parts[image].append(Candidates(values, index + first))
        first += anchors * rows * columns
    return [
        Candidates(
            np.concatenate([part.decoded for part in of_image]),
            np.concatenate([part.anchor_index for part in of_image]),
        )
        for of_image in parts
    ]


@dataclass(frozen=True, slots=True)
class HeadGeometry:
    """Where one head's cells and anchors lie on the canvas."""

    grid_hw: tuple[int, int]
    stride: int
    anchors_wh: FloatArray
    view: View
    canvas_width: int


def geometries(heads: Sequence[RawHead], spec: ModelSpec) -> list[HeadGeometry]:
    """Of each head, in their order."""
    width = canvas_of_heads(heads, spec)[1]
    return [
        HeadGeometry(
            grid_hw=(head.shape[2], head.shape[3]),
            stride=spec.strides[source.level],
            anchors_wh=np.array(spec.anchors[source.level], np.float32),
            view=source.view,
            canvas_width=width,
        )
        for source, head in zip(_sources_of(heads, spec), heads, strict=True)
    ]


def decode_boxes(values: FloatArray, index: NDArray[np.int64], head: HeadGeometry) -> None:
    """Turn the first four of (..., K, 5 + nc) sigmoids into boxes of the canvas in place.

    `index` (K,) counts anchor, row, column within the head.
    """
    rows, columns = head.grid_hw
    anchor, cell = np.divmod(index, rows * columns)
    row, column = np.divmod(cell, columns)
    grid = np.stack((column, row), axis=-1).astype(np.float32)
    values[..., 0:2] = (values[..., 0:2] * 2 - 0.5 + grid) * np.float32(head.stride)
    values[..., 2:4] = (values[..., 2:4] * 2) ** 2 * head.anchors_wh[anchor]
    if head.view.percent != 100:
        values[..., 0:4] /= np.float32(head.view.scale)
    if head.view.mirrored:
        values[..., 0] = np.float32(head.canvas_width) - values[..., 0]
