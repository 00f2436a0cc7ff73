"""What training sees of the data set: one `Sample` an image, with or without boxes."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.contest import LabelledImages
from parkdet.runtime.errors import DataError
from parkdet.runtime.geometry import FloatArray
from parkdet.runtime.image_headers import read_header

log = logging.getLogger(__name__)

EXAMPLES = 5
"""Images left out that the log names."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One image of the training set and its boxes. An image without boxes is background, and trains."""

    image_id: int
    path: Path
    image_hw: tuple[int, int]
    """Height and width in pixels of the image as it decodes."""
    class_ids: NDArray[np.int32]
    """Classes (n,), counted from 0 in ascending order of the category ids."""
    xyxy: FloatArray
    """Boxes (n, 4), two corners in image pixels."""

    def __post_init__(self) -> None:
        count = len(self.class_ids)
        if self.class_ids.shape != (count,) or self.class_ids.dtype != np.int32:
            raise ValueError(f"class_ids must be (n,) int32, not {self.class_ids.shape} {self.class_ids.dtype}")
        if self.xyxy.shape != (count, 4) or self.xyxy.dtype != np.float32:
            raise ValueError(f"xyxy must be ({count}, 4) float32, not {self.xyxy.shape} {self.xyxy.dtype}")
        if min(self.image_hw) < 1:
            raise ValueError(f"an image of {self.image_hw[0]} x {self.image_hw[1]} pixels cannot train")


def samples_from(labels: LabelledImages, ids: Collection[int]) -> tuple[Sample, ...]:
    """The samples of the images with these ids, in file order, from the boxes that can be used.

    Sizes are those of the files' headers, which is what the images decode to, whatever the JSON file says.
    An image whose file is missing, cut off or has no readable header is left out, and the log names examples.
    DataError when an id is not in the data set, or when no image is left.
    """
    wanted = set(ids)
    unknown = wanted - {record.image_id for record in labels.records}
    if unknown:
        raise DataError(
            f"{labels.images.json_path}: has no image with id {min(unknown)} ({len(unknown)} such ids); "
            "make the split again with 'parkdet prepare'"
        )
    image_wh = np.zeros((len(labels.records), 2), np.int64)
    usable: dict[int, Path] = {}
    left_out: list[str] = []
    for index, record in enumerate(labels.records):
        if record.image_id not in wanted:
            continue
        wanted.discard(record.image_id)  # of two entries with one id the first has the boxes
        if record.path is None:
            left_out.append(f"{record.file_name} has no file")
            continue
        header = read_header(record.path)
        if header.problem is None:
            usable[index] = record.path
            image_wh[index] = header.width, header.height
        else:
            left_out.append(f"{record.file_name} {header.problem}")
    if not usable:
        raise DataError(
            f"{labels.images.folder}: none of the {len(ids)} images can be used; run 'parkdet prepare' to see why"
        )
    if left_out:
        named = "".join(f"\n  {line}" for line in left_out[:EXAMPLES])
        more = f"\n  and {len(left_out) - EXAMPLES} more" if len(left_out) > EXAMPLES else ""
        log.warning(
            "%s: %d of %d images are left out; 'parkdet prepare' tells all%s%s",
            labels.images.folder, len(left_out), len(ids), named, more,
        )  # fmt: skip
    boxes = labels.clean(image_wh)
    samples = []
    for index, path in usable.items():
        xyxy, class_ids = boxes.of(index)
        hw = (int(image_wh[index, 1]), int(image_wh[index, 0]))
        sample = Sample(labels.records[index].image_id, path, hw, class_ids.astype(np.int32), xyxy.astype(np.float32))
        samples.append(sample)
    return tuple(samples)
