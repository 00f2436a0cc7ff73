"""Cases in a file, as run_cases.cpp reads them: inputs and the right outputs, little-endian."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.detections import Detections
from parkdet.runtime.nms import NmsCounts
from tests.gpu_free.kernels.cases import Case, LetterboxCase, NmsCase


def write_cases(path: Path, cases: Sequence[Case]) -> None:
    """What run_cases.cpp reads: inputs and the right outputs, little-endian."""
    parts: list[bytes] = [struct.pack("<i", len(cases))]
    for case in cases:
        if isinstance(case, NmsCase):
            parts += _nms_bytes(case)
        elif isinstance(case, LetterboxCase):
            parts += _letterbox_bytes(case)
        else:
            parts += [struct.pack("<i64s2i", 2, _name(case.name), 0, len(case.raw)), case.raw.tobytes()]
            parts.append(case.expected().tobytes())
    path.write_bytes(b"".join(parts))


def _name(name: str) -> bytes:
    return name.encode()[:63].ljust(64, b"\0")


def _nms_bytes(case: NmsCase) -> Iterator[bytes]:
    settings, heads = case.settings, case.heads
    batch, half = heads[0].shape[0], heads[0].dtype == np.float16
    yield struct.pack("<i64s3i", 0, _name(case.name), case.schedule, case.runs, case.images_before)
    yield struct.pack(
        "<8i2f", len(heads), case.spec.num_classes, batch, half, settings.max_det, case.max_candidates,
        settings.multi_label, settings.agnostic, settings.conf, settings.iou,
    )  # fmt: skip
    for head, geometry in zip(heads, case.geometries, strict=True):
        anchors = np.array(geometry.anchors_wh, np.float32)
        yield struct.pack(
            "<3i2fi", len(anchors), *geometry.grid_hw, geometry.stride, geometry.view_scale, geometry.view_flip
        )
        yield anchors.tobytes() + np.ascontiguousarray(head).tobytes()
    yield b"".join(array.tobytes() for array in outputs(case.expected(), settings.max_det))


def outputs(results: Sequence[tuple[Detections, NmsCounts]], max_det: int) -> tuple[NDArray[Any], ...]:
    """The arrays that the kernels write for these results: num_dets, candidates, at_max_det, boxes, scores, classes."""
    batch = len(results)
    boxes = np.zeros((batch, max_det, 4), np.float32)
    scores = np.zeros((batch, max_det), np.float32)
    classes = np.full((batch, max_det), -1, np.int32)
    for image, (found, _) in enumerate(results):
        count = len(found.scores)
        boxes[image, :count], scores[image, :count], classes[image, :count] = found.xyxy, found.scores, found.class_ids
    return (
        np.array([len(found.scores) for found, _ in results], np.int32),
        np.array([counts.candidates for _, counts in results], np.int32),
        np.array([counts.at_max_det for _, counts in results], np.int32),
        boxes,
        scores,
        classes,
    )


def _letterbox_bytes(case: LetterboxCase) -> Iterator[bytes]:
    box, image = case.letterbox, case.image
    pitch = image.strides[0]
    yield struct.pack("<i64si", 1, _name(case.name), case.schedule)
    yield struct.pack("<9i", *box.image_hw, pitch, *box.resized_hw, *box.canvas_hw, box.top, box.left)
    rows = np.zeros((len(image), pitch), np.uint8)
    rows[:, : image.shape[1] * 3] = image.reshape(len(image), -1)
    yield rows.tobytes() + case.expected().tobytes()
