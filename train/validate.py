"""Validation: the network on whole images through the runtime's letterbox, decoding and NMS, measured by COCO AP."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from parkdet.runtime.detections import Detections
from parkdet.runtime.errors import DataError
from parkdet.runtime.evaluation import Evaluation, evaluate
from parkdet.runtime.geometry import ImageArray, Letterbox, xyxy_to_cxcywh, xyxy_to_xywh
from parkdet.runtime.images import read_image
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.nms import NmsSettings
from parkdet.runtime.ranking import suppress_heads
from parkdet.runtime.shards import write_atomically
from parkdet.train.config import ValSettings
from parkdet.train.data.samples import Sample
from parkdet.train.model.loss import DetectionLoss
from parkdet.train.model.network import Yolov5
from parkdet.train.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What a network does on held-out images."""

    evaluation: Evaluation
    losses: tuple[float, float, float]
    """Box, objectness and class loss, the mean over images; NaN where no loss was given."""
    unreadable: tuple[str, ...]
    """What was wrong with the images that could not be read; they count as images without detections."""
    found: tuple[tuple[Sample, Detections], ...] = ()
    """The images that could be read, and what was detected in each, in pixels of the image."""

    def ap_by_class(self, spec: ModelSpec) -> dict[int, float]:
        """AP@[.5:.95] by class id, 0 for classes that have no truth."""
        found = {entry.category_id: entry.ap for entry in self.evaluation.per_class}
        values = {i: found.get(category) for i, category in enumerate(spec.category_ids)}
        return {i: 0.0 if ap is None or np.isnan(ap) else float(ap) for i, ap in values.items()}


def validate(
    network: Yolov5,
    samples: Sequence[Sample],
    settings: ValSettings,
    *,
    imgsz: int,
    batch_size: int,
    loss: DetectionLoss | None = None,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> Validation | None:
    """Detect on every sample's own canvas and compare with its boxes; None when `stop` said so meanwhile.

    Runs on the device of the network's weights. Several processes, all of which call it, take a share of the images
    each, and all of them get the whole result. DataError when there is no image, or not one can be read.
    """
    if not samples:
        raise DataError("there is no image to validate on; the data set is too small for its split")
    spec = network.spec
    device = next(network.parameters()).device
    fused = network.fused().to(device)
    nms = NmsSettings(conf=settings.conf, iou=settings.iou, max_det=settings.max_det)
    found: list[tuple[Sample, Detections]] = []
    sums, seen = torch.zeros(3), 0
    unreadable: list[str] = []
    stopped = False
    # Not inference mode: tensors that the loss keeps from here could not be trained with.
    with torch.no_grad():
        for batch in _batches(samples[ranks.rank :: ranks.world], imgsz, spec.stride_max, batch_size, unreadable):
            stopped = stop()
            if stopped:
                break
            canvases = np.stack([canvas for _, _, canvas in batch])
            images = torch.from_numpy(canvases).to(device).flip(3).permute(0, 3, 1, 2).float() / 255
            heads = [head.float() for head in fused(images)]
            if loss is not None:
                _, parts = loss(heads, _targets(batch).to(device))
                sums += parts.cpu() * len(batch)
            seen += len(batch)
            on_canvas = suppress_heads([head.cpu().numpy() for head in heads], spec, nms)
            for (sample, letterbox, _), (detections, _) in zip(batch, on_canvas, strict=True):
                found.append((sample, detections.moved(letterbox.to_image(detections.xyxy))[0]))
    shares = ranks.gather((stopped, found, sums, seen, unreadable))
    if any(share[0] for share in shares):
        return None
    found = [one for share in shares for one in share[1]]
    sums, seen = sum((share[2] for share in shares), torch.zeros(3)), sum(share[3] for share in shares)
    unreadable = [line for share in shares for line in share[4]]
    if not seen:
        raise DataError(f"none of the {len(samples)} validation images can be read: {unreadable[0]}")
    evaluation = evaluate(_table(found, spec), _truth(samples, spec), max_det=settings.max_det)
    means = sums / seen if loss is not None else torch.full((3,), torch.nan)
    box, objectness, classes = (float(value) for value in means)
    return Validation(
        evaluation=evaluation, losses=(box, objectness, classes), unreadable=tuple(unreadable), found=tuple(found)
    )


def write_coco_json(path: Path, validation: Validation, spec: ModelSpec) -> None:
    """The detections in COCO's result format, every digit kept: other tools compute the same AP from it."""
    columns = _table(validation.found, spec).to_dict(as_series=False)
    boxes = zip(*(columns[name] for name in "xywh"), strict=True)
    rows = [
        {"image_id": image, "category_id": category, "bbox": list(box), "score": score}
        for image, category, box, score in zip(
            columns["image_id"], columns["category_id"], boxes, columns["score"], strict=True
        )
    ]
    write_atomically(path, json.dumps(rows).encode())


_Canvas = tuple[Sample, Letterbox, ImageArray]
_WAITING_BATCHES = 4
"""Canvases that wait for others of their size, in batches: a set of many sizes must not fill the memory."""


def _batches(
    samples: Sequence[Sample], imgsz: int, stride: int, batch_size: int, unreadable: list[str]
) -> Iterator[list[_Canvas]]:
    """Batches of one canvas size each; every image keeps its own canvas."""
    waiting: dict[tuple[int, int], list[_Canvas]] = defaultdict(list)
    for sample in samples:
        try:
            image = read_image(sample.path)
        except DataError as error:
            unreadable.append(str(error))
            continue
        letterbox = Letterbox.fit((image.shape[0], image.shape[1]), imgsz, stride)
        batch = waiting[letterbox.canvas_hw]
        batch.append((sample, letterbox, letterbox.apply(image)))
        if len(batch) == batch_size:
            yield waiting.pop(letterbox.canvas_hw)
        elif sum(map(len, waiting.values())) > _WAITING_BATCHES * batch_size:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()


def _targets(batch: Sequence[_Canvas]) -> Tensor:
    rows = [np.zeros((0, 6), np.float32)]
    for number, (sample, letterbox, canvas) in enumerate(batch):
        height, width = canvas.shape[:2]
        boxes = xyxy_to_cxcywh(letterbox.to_canvas(sample.xyxy)) / np.array([width, height] * 2, np.float32)
        index = np.full((len(boxes), 1), number, np.float32)
        rows.append(np.concatenate((index, sample.class_ids[:, None], boxes), axis=1).astype(np.float32))
    return torch.from_numpy(np.concatenate(rows))


def _table(found: Sequence[tuple[Sample, Detections]], spec: ModelSpec) -> pl.DataFrame:
    category_ids = np.array(spec.category_ids, np.int64)
    counts = [len(detections) for _, detections in found]
    xywh = np.concatenate([np.zeros((0, 4), np.float32), *(xyxy_to_xywh(detections.xyxy) for _, detections in found)])
    class_ids = np.concatenate([np.zeros(0, np.int32), *(detections.class_ids for _, detections in found)])
    scores = np.concatenate([np.zeros(0, np.float32), *(detections.scores for _, detections in found)])
    return pl.DataFrame(
        {
            "image_id": np.repeat(np.array([sample.image_id for sample, _ in found], np.int64), counts),
            "category_id": category_ids[class_ids],
            **{name: xywh[:, column] for column, name in enumerate("xywh")},
            "score": scores,
        }
    )


def _truth(samples: Sequence[Sample], spec: ModelSpec) -> dict[str, object]:
    annotations: list[dict[str, object]] = []
    for sample in samples:
        for box, class_id in zip(xyxy_to_xywh(sample.xyxy).tolist(), sample.class_ids.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": sample.image_id,
                    "category_id": spec.category_ids[class_id],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    return {
        "images": [
            {"id": sample.image_id, "height": sample.image_hw[0], "width": sample.image_hw[1]} for sample in samples
        ],
        "categories": [
            {"id": category, "name": name} for category, name in zip(spec.category_ids, spec.class_names, strict=True)
        ],
        "annotations": annotations,
    }
