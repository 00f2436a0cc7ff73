"""What a host must know to launch the kernels: parameters (`parameters.h`), workspace, outputs, launches (`plan.h`).

Nothing here touches a GPU: addresses are integers, a launch is a record of an entry's name, its grid and its bytes.
The TensorRT backend, the simulation and programs of others use the same functions.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.detections import Detections
from parkdet.runtime.geometry import Letterbox
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.nms import MAX_CANDIDATES, NmsCounts, NmsSettings
from parkdet.runtime.views import head_sources

MAX_HEADS = 16
MAX_ANCHORS = 8
ALIGNMENT = 256
"""Of every array in workspace and outputs, and what is asked of their addresses."""

_COLLECT_THREADS = 256
_BLOCK_ANCHORS = _COLLECT_THREADS * 4
_SORT_THREADS = 1024
_SORT_TILE = 2048
_SUPPRESS_THREADS = 1024
_DIGITS = 8
_BINS = 256
_LETTERBOX_BLOCK = (32, 8)
_KEY_BYTES, _BOX_BYTES = 8, 16
_PICK_BYTES = 16
_STATE_BYTES = 16 + _DIGITS * (_PICK_BYTES + 4 * _BINS)


class Head(ctypes.Structure):
    """`parkdet::Head`: one raw output of the network."""

    _fields_ = (
        ("raw", ctypes.c_uint64),
        ("first_anchor", ctypes.c_int32),
        ("anchors", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("stride", ctypes.c_float),
        ("view_scale", ctypes.c_float),
        ("view_flip", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("anchor_wh", ctypes.c_float * 2 * MAX_ANCHORS),
    )


class NmsParameters(ctypes.Structure):
    """`parkdet::NmsParameters`: what every kernel of the post-processing is given."""

    _fields_ = (
        ("heads", Head * MAX_HEADS),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_anchors", "num_classes", "batch", "half_heads",
                                              "max_det", "max_candidates", "multi_label", "agnostic", "round")),
        *((name, ctypes.c_float) for name in ("conf", "iou", "logit_floor", "canvas_width")),
        *((name, ctypes.c_uint64) for name in ("num_dets", "boxes", "scores", "classes", "candidates", "at_max_det",
                                               "states", "keys", "ranked_keys", "ranked_boxes")),
    )  # fmt: skip


class LetterboxParameters(ctypes.Structure):
    """`parkdet::LetterboxParameters`: one image onto its canvas."""

    _fields_ = (
        ("image", ctypes.c_uint64),
        ("canvas", ctypes.c_uint64),
        ("image_pitch", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("image_height", "image_width", "resized_height", "resized_width",
                                              "canvas_height", "canvas_width", "top", "left")),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch: no dynamic shared memory, one parameter."""

    entry: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: ctypes.Structure
    """Passed by value: `ctypes.addressof` of it is the one entry of the driver's `kernelParams`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadGeometry:
    """One raw head of a graph on one canvas."""

    grid_hw: tuple[int, int]
    stride: int
    anchors_wh: tuple[tuple[float, float], ...]
    view_scale: float = 1.0
    view_flip: bool = False

    @property
    def num_anchors(self) -> int:
        return len(self.anchors_wh) * self.grid_hw[0] * self.grid_hw[1]


def head_geometries(spec: ModelSpec, canvas_hw: tuple[int, int]) -> list[HeadGeometry]:
    """The raw heads that a graph of this spec gives of a canvas, in the order of its outputs."""
    return [
        HeadGeometry(
            grid_hw=(
                source.view.padded(canvas_hw[0], spec.stride_max) // spec.strides[source.level],
                source.view.padded(canvas_hw[1], spec.stride_max) // spec.strides[source.level],
            ),
            stride=spec.strides[source.level],
            anchors_wh=spec.anchors[source.level],
            view_scale=source.view.scale,
            view_flip=source.view.mirrored,
        )
        for source in head_sources(len(spec.strides), spec.tta)
    ]


def nms_parameters(
    heads: Sequence[HeadGeometry],
    num_classes: int,
    settings: NmsSettings,
    *,
    half_heads: bool,
    max_candidates: int = MAX_CANDIDATES,
) -> NmsParameters:
    """Parameters without addresses and batch. The first head is the full view's finest: the canvas is as wide.

    ValueError where the heads are too many or too large for the kernels.
    """
    if not 1 <= len(heads) <= MAX_HEADS:
        raise ValueError(f"the kernels take 1 to {MAX_HEADS} heads, not {len(heads)}")
    if num_classes < 1 or max_candidates < 1:
        raise ValueError(f"there must be a class and room for a candidate, not {num_classes} and {max_candidates}")
    parameters = NmsParameters()
    first = 0
    for index, head in enumerate(heads):
        if not 1 <= len(head.anchors_wh) <= MAX_ANCHORS:
            raise ValueError(f"the kernels take 1 to {MAX_ANCHORS} anchors a cell, not {len(head.anchors_wh)}")
        at = parameters.heads[index]
        at.first_anchor, at.anchors = first, len(head.anchors_wh)
        at.rows, at.columns = head.grid_hw
        at.stride, at.view_scale, at.view_flip = head.stride, head.view_scale, head.view_flip
        for anchor, (width, height) in enumerate(head.anchors_wh):
            at.anchor_wh[anchor][0], at.anchor_wh[anchor][1] = width, height
        first += head.num_anchors
    if first * num_classes >= 2**31:
        raise ValueError(f"{first:,} anchors of {num_classes} classes are more than the kernels can number")
    parameters.num_heads, parameters.num_anchors, parameters.num_classes = len(heads), first, num_classes
    parameters.half_heads = half_heads
    parameters.max_det, parameters.max_candidates = settings.max_det, max_candidates
    parameters.multi_label, parameters.agnostic = settings.multi_label, settings.agnostic
    parameters.conf, parameters.iou = settings.conf, settings.iou
    parameters.logit_floor = logit_floor(parameters.conf)
    parameters.canvas_width = heads[0].grid_hw[1] * heads[0].stride
    return parameters


def logit_floor(conf: float) -> float:
    """The logit at or under which no sigmoid is larger than conf, whatever its last places."""
    if conf <= 0:
        return -math.inf
    if conf >= 1:
        return math.inf
    return math.log(conf / (1 - conf)) - 1e-3 - 1e-6 / (1 - conf)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _workspace_sizes(batch: int, max_candidates: int) -> tuple[int, int, int, int]:
    slots = batch * max_candidates
    return (
        _aligned(batch * _STATE_BYTES),
        _aligned(slots * _KEY_BYTES),
        _aligned(slots * _KEY_BYTES),
        _aligned(slots * _BOX_BYTES),
    )


def workspace_bytes(batch: int, max_candidates: int = MAX_CANDIDATES) -> int:
    """Device memory that a run of so many images needs beside its outputs. It need not be cleared."""
    return sum(_workspace_sizes(batch, max_candidates))


def bind_workspace(parameters: NmsParameters, address: int) -> None:
    """Point into a workspace of `workspace_bytes(parameters.batch, parameters.max_candidates)`."""
    sizes = _workspace_sizes(parameters.batch, parameters.max_candidates)
    for name, size in zip(("states", "keys", "ranked_keys", "ranked_boxes"), sizes, strict=True):
        setattr(parameters, name, address)
        address += size


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """One run's outputs in one buffer, so that they come back in one copy."""

    batch: int
    max_det: int

    _ARRAYS = (
        ("num_dets", np.int32, False, 1),
        ("candidates", np.int32, False, 1),
        ("at_max_det", np.int32, False, 1),
        ("boxes", np.float32, True, 4),
        ("scores", np.float32, True, 1),
        ("classes", np.int32, True, 1),
    )

    def _shapes(self) -> Iterator[tuple[str, type[np.generic], tuple[int, ...], int]]:
        """Name, type, shape and offset of each array."""
        offset = 0
        for name, dtype, by_slot, width in self._ARRAYS:
            shape = (self.batch, *((self.max_det,) if by_slot else ()), *((width,) if width > 1 else ()))
            yield name, dtype, shape, offset
            offset += _aligned(4 * math.prod(shape))

    @property
    def nbytes(self) -> int:
        *_, (_, _, shape, offset) = self._shapes()
        return offset + _aligned(4 * math.prod(shape))

    def bind(self, parameters: NmsParameters, address: int) -> None:
        """Have the kernels write to a buffer of `nbytes` at this address."""
        for name, _, _, offset in self._shapes():
            setattr(parameters, name, address + offset)

    def arrays(self, buffer: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """The outputs by name: views of a host copy of the buffer, (nbytes,) uint8."""
        return {
            name: np.ndarray(shape, dtype, buffer=buffer.data, offset=offset)
            for name, dtype, shape, offset in self._shapes()
        }

    def read(
        self, buffer: NDArray[np.uint8], images: int, max_candidates: int = MAX_CANDIDATES
    ) -> list[tuple[Detections, NmsCounts]]:
        """Detections in canvas pixels and counts of the first `images` images: copies."""
        out = self.arrays(buffer)
        results = []
        for image in range(images):
            kept = slice(int(out["num_dets"][image]))
            found = int(out["candidates"][image])
            detections = Detections(
                out["boxes"][image, kept].copy(), out["scores"][image, kept].copy(), out["classes"][image, kept].copy()
            )
            counts = NmsCounts(
                candidates=found,
                over_limit=max(found - max_candidates, 0),
                at_max_det=bool(out["at_max_det"][image]),
            )
            results.append((detections, counts))
        return results


def nms_launches(parameters: NmsParameters) -> list[Launch]:
    """The post-processing of `parameters.batch` images, in stream order, addresses as they are now."""
    images = parameters.batch
    blocks = -(-parameters.num_anchors // _BLOCK_ANCHORS)
    tiles = -(-parameters.max_candidates // _SORT_TILE)

    def launch(entry: str, grid_x: int, grid_y: int, threads: int, number: int = 0) -> Launch:
        own = NmsParameters.from_buffer_copy(parameters)
        own.round = number
        return Launch(f"parkdet_{entry}", (grid_x, grid_y, 1), (threads, 1, 1), own)

    return [
        launch("reset", images, 1, _BINS),
        launch("collect", blocks, images, _COLLECT_THREADS, 0),
        *(launch("select", blocks, images, _COLLECT_THREADS, digit) for digit in range(_DIGITS)),
        launch("collect", blocks, images, _COLLECT_THREADS, 1),
        launch("sort", tiles, images, _SORT_THREADS),
        launch("rank", tiles, images, _SORT_THREADS),
        launch("suppress", images, 1, _SUPPRESS_THREADS),
    ]


def letterbox_launch(letterbox: Letterbox, image: int, canvas: int, image_pitch: int = 0) -> Launch:
    """One BGR uint8 image at address `image`, rows `image_pitch` bytes apart, onto its canvas at address `canvas`.

    The canvas is (height, width, 3) uint8 without gaps; all of it is written. A pitch of 0 says that the image has no
    gaps. ValueError where a side, or the canvas, is too large for the kernel's integers.
    """
    for side, resized in zip(letterbox.image_hw, letterbox.resized_hw, strict=True):
        if 2 * (side + 1) * (resized + 1) >= 2**31 or side >= 2**24:
            raise ValueError(f"a side of {side} pixels scaled to {resized} is too long for the letterbox kernel")
    (height, width), (canvas_height, canvas_width) = letterbox.image_hw, letterbox.canvas_hw
    if 3 * canvas_height * canvas_width >= 2**31:
        raise ValueError(f"a canvas of {canvas_height} x {canvas_width} pixels is too large for the letterbox kernel")
    parameters = LetterboxParameters(
        image, canvas, image_pitch or 3 * width, height, width, *letterbox.resized_hw, canvas_height, canvas_width,
        letterbox.top, letterbox.left,
    )  # fmt: skip
    across, down = _LETTERBOX_BLOCK
    grid = (-(-canvas_width // across), -(-canvas_height // down), 1)
    return Launch("parkdet_letterbox", grid, (across * down, 1, 1), parameters)
