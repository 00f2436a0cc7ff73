"""Run folders of `parkdet infer` as the submission reads them: whole, complete, a shard at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from parkdet.runtime.candidates import CANDIDATES_FOLDER, ImageCandidates, read_candidate_shard
from parkdet.runtime.errors import ArtifactError, UsageError
from parkdet.runtime.geometry import xyxy_to_xywh
from parkdet.runtime.shards import Shard, read_table, shard_paths
from parkdet.runtime.store import IMAGES_FILE, read_fingerprint, sound_shards

_DECIDE_SCORES = ("model", "precision", "imgsz", "tta", "conf", "iou", "max_det", "multi_label", "agnostic")
"""What must be equal for the scores of one run to say something about those of another."""


@dataclass(frozen=True, slots=True)
class NmsChoice:
    """The settings of NMS that can be chosen once candidates are kept."""

    iou: float
    max_det: int

    def __str__(self) -> str:
        return f"IoU {self.iou:g}, at most {self.max_det} an image"


@dataclass(frozen=True, slots=True)
class PredictionRun:
    """One run's shards, known to be sound and of one run."""

    folder: Path
    shards: tuple[Shard, ...]
    fingerprint: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> PredictionRun:
        """Raises UsageError where there is no run, ArtifactError where a shard is damaged or of another run."""
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; name the run folder of 'parkdet infer'")
        return cls(folder, tuple(sound_shards(folder)), read_fingerprint(folder) or {})

    @property
    def is_over_a_folder(self) -> bool:
        """Whether it is one of `parkdet infer --source`: its image ids are its own, not a data set's."""
        return (self.folder / IMAGES_FILE).exists()

    @property
    def covered(self) -> set[int]:
        """Ids of the images that have a result, with or without detections."""
        return {image_id for shard in self.shards for image_id in shard.covered}

    @property
    def failed(self) -> dict[int, str]:
        """Why an image has no result, by id."""
        covered = self.covered
        failed = (image for shard in self.shards for image in shard.failed)
        return {image.image_id: image.reason for image in failed if image.image_id not in covered}

    @property
    def has_candidates(self) -> bool:
        """Whether NMS can be repeated."""
        return bool(shard_paths(self.folder / CANDIDATES_FOLDER))

    @property
    def nms(self) -> NmsChoice | None:
        """As it was inferred; None where the run does not say."""
        iou, max_det = self.fingerprint.get("iou"), self.fingerprint.get("max_det")
        return NmsChoice(float(iou), int(max_det)) if iou is not None and max_det is not None else None

    def batches(self, nms: NmsChoice | None = None) -> Iterator[pl.DataFrame]:
        """The detections, a shard at a time; with other NMS settings from the candidates kept."""
        if nms is not None and nms != self.nms:
            for path in shard_paths(self.folder / CANDIDATES_FOLDER):
                yield suppressed(read_candidate_shard(path), nms)
            return
        for shard in self.shards:
            frame = pl.from_arrow(read_table(shard.path).replace_schema_metadata(None))
            assert isinstance(frame, pl.DataFrame)
            yield frame

    def table(self, nms: NmsChoice | None = None) -> pl.DataFrame:
        """All detections by image id, as `parkdet.runtime.store.read_predictions` gives them."""
        return pl.concat(self.batches(nms)).sort("image_id", maintain_order=True)

    def require_complete(self, file_names: Mapping[int, str]) -> list[str]:
        """ArtifactError while images are not done; else those that could not be read, as `name (reason)`."""
        covered, failed = self.covered, self.failed
        undone = [image_id for image_id in file_names if image_id not in covered and image_id not in failed]
        if undone:
            examples = ", ".join(file_names[image_id] for image_id in undone[:3])
            raise ArtifactError(
                f"{self.folder}: {len(undone):,} of {len(file_names):,} test images are not done yet, e.g. {examples}; "
                "run 'parkdet infer' again, it does only what is missing"
            )
        return [f"{file_names[image_id]} ({failed[image_id]})" for image_id in file_names if image_id in failed]

    def require_same_scores(self, other: PredictionRun) -> None:
        """UsageError where the scores of this run say nothing about those of the other."""
        differing = [
            f"{key.replace('_', ' ')} {_short(mine)} here, {_short(theirs)} there"
            for key in _DECIDE_SCORES
            if (mine := self.fingerprint.get(key)) != (theirs := other.fingerprint.get(key))
        ]
        if differing:
            raise UsageError(
                f"--tune {self.folder}: is of another model or other settings than {other.folder}: "
                f"{'; '.join(differing)}; run 'parkdet infer --split val' as the predictions were made"
            )


def suppressed(candidates: Iterable[ImageCandidates], nms: NmsChoice) -> pl.DataFrame:
    """The detections of some images, their NMS repeated."""
    parts: list[pl.DataFrame] = []
    for image in candidates:
        xyxy, scores, category_ids = image.detections(iou=nms.iou, max_det=nms.max_det)
        xywh = xyxy_to_xywh(xyxy)
        parts.append(
            pl.DataFrame(
                {
                    "image_id": np.full(len(scores), image.image_id, np.int64),
                    "category_id": category_ids.astype(np.int32),
                    **{name: np.ascontiguousarray(xywh[:, column], np.float32) for column, name in enumerate("xywh")},
                    "score": scores.astype(np.float32),
                }
            )
        )
    ids, numbers = (
        {"image_id": pl.Int64, "category_id": pl.Int32},
        dict.fromkeys(("x", "y", "w", "h", "score"), pl.Float32),
    )
    return pl.concat([pl.DataFrame(schema={**ids, **numbers}), *parts])


def _short(value: object) -> object:
    """A checksum's first digits; anything else as it is."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else value
