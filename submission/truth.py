"""Which of a data set's images a run is over, and their truth as the labels have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from parkdet.runtime.contest import ContestData, ImageRecord, Part
from parkdet.runtime.errors import UsageError
from parkdet.runtime.store import image_list_digest
from parkdet.submission.runs import PredictionRun


def part_of(run: PredictionRun, data: ContestData) -> Part | None:
    """The part of the data set that holds a run's images; None for a run over a plain folder, and where neither does.

    Ids, and names too, may be the same in both parts. So the list that the run recorded decides; ids do where it is
    neither part's: of a validation run that is not finished, or after the JSON changed.
    """
    if run.is_over_a_folder:
        return None
    ids = run.covered | run.failed.keys()
    parts: tuple[Part, ...] = ("test", "train")
    records: dict[Part, tuple[ImageRecord, ...]] = {}
    for part in parts:
        records[part] = listed = records_of(part, data)
        # A run over the test images is over all of them; one over the training images perhaps over those held out.
        held_out = [record for record in listed if record.image_id in ids] if part == "train" else []
        for some in (listed, held_out):
            digest = image_list_digest((record.image_id, record.file_name) for record in some)
            if some and digest == run.fingerprint.get("image_list"):
                return part
    fitting = [part for part, listed in records.items() if ids and ids <= {record.image_id for record in listed}]
    if len(fitting) == 2:
        return "test" if run.fingerprint.get("images") == len(records["test"]) else "train"
    return fitting[0] if fitting else None


def require_test_run(run: PredictionRun, file_names: Mapping[int, str], data: ContestData) -> None:
    """UsageError where a run is over other images than the test ones (`file_names` by id), though with their ids."""
    listed = image_list_digest(file_names.items())
    is_listed = run.fingerprint.get("image_list", listed) == listed
    if run.is_over_a_folder or (not is_listed and part_of(run, data) == "train"):
        raise UsageError(
            f"{run.folder}: is not over the test images of {data.root}; "
            f"name a run of 'parkdet infer --data {data.root}'"
        )


def records_of(part: Part, data: ContestData) -> tuple[ImageRecord, ...]:
    """The images of a part; none where the data set lacks its JSON."""
    if part == "test":
        return data.test_images() if data.test_json.is_file() else ()
    return data.train_labels().records if data.train_json.is_file() else ()


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
