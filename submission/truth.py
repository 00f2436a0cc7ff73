"""The truth of the images that a run covers, as the labels have it."""

from __future__ import annotations

from typing import Any

import numpy as np

from parkdet.runtime.contest import ContestData
from parkdet.runtime.errors import UsageError


def truth_of(data: ContestData, image_ids: set[int], run: str) -> dict[str, Any]:
    """COCO images, categories and boxes, the boxes those that training uses (`LabelledImages.clean`).

    UsageError, which names the run, where an image is not among the labelled ones.
    """
    labels = data.train_labels()
    places = {record.image_id: place for place, record in enumerate(labels.records)}
    unknown = sorted(image_ids - places.keys())
    if unknown:
        raise UsageError(
            f"{run}: {len(unknown):,} of its {len(image_ids):,} images have no truth in {data.train_json}, "
            f"e.g. image {unknown[0]}; name a run of 'parkdet infer --split val'"
        )
    boxes = labels.clean()
    annotations: list[dict[str, Any]] = []
    for image_id in sorted(image_ids):
        rows = range(int(boxes.starts[places[image_id]]), int(boxes.starts[places[image_id] + 1]))
        for row in rows:
            left, top, right, bottom = boxes.xyxy[row].tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(boxes.category_ids[row]),
                    "bbox": [left, top, right - left, bottom - top],
                    "area": float(np.prod(boxes.xyxy[row, 2:] - boxes.xyxy[row, :2])),
                    "iscrowd": 0,
                }
            )
    return {
        "images": [{"id": image_id} for image_id in sorted(image_ids)],
        "categories": [{"id": category_id, "name": name} for category_id, name in labels.categories.items()],
        "annotations": annotations,
    }
