"""The labelled images of a data set in their two parts: to train on, and to validate on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parkdet.runtime.contest import ContestData
from parkdet.runtime.split import split_ids
from parkdet.train.config import Recipe
from parkdet.train.data.samples import Sample, samples_from


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """The two parts of the labelled images."""

    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    images_folder: Path

    def described(self) -> dict[str, int | str]:
        """What a stopped run keeps of it, to know it again wherever it lies: counts, and a digest of all labels."""
        digest = hashlib.sha256(repr((self.class_names, self.category_ids)).encode())
        for sample in (*self.train, *self.val):
            digest.update(repr((sample.image_id, sample.path.name, sample.image_hw)).encode())
            digest.update(sample.class_ids.tobytes() + sample.xyxy.tobytes())
        return {
            "train_images": len(self.train),
            "train_boxes": count_boxes(self.train),
            "val_images": len(self.val),
            "labels_sha256": digest.hexdigest(),
        }


def count_boxes(samples: Sequence[Sample]) -> int:
    """Boxes of all samples together."""
    return sum(len(sample.class_ids) for sample in samples)


def read_training_data(root: Path, recipe: Recipe) -> TrainingData:
    """Read the labels and split them as the recipe says. DataError where there is nothing to train on."""
    data = ContestData(root)
    labels = data.train_labels()
    split = split_ids([record.image_id for record in labels.records], recipe.split.seed, recipe.split.count)
    return TrainingData(
        train=samples_from(labels, split.train_ids),
        # A single image trains; there is none to validate on.
        val=samples_from(labels, split.val_ids) if split.val_ids else (),
        class_names=labels.class_names,
        category_ids=tuple(labels.categories),
        images_folder=data.images_folder("train"),
    )
