"""Candidates kept beside a run's predictions, so that NMS can be repeated with other settings without the model.

`candidates/part-*.parquet` goes with `predictions/part-*.parquet` of the same number and covers the same images.
Rows are `image_id, category_id, x1, y1, x2, y2, score`, float32 canvas pixels, in the order in which NMS takes
them. The metadata has, under `parkdet.candidates`, the settings of that NMS and the letterbox of every image.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.errors import ArtifactError, UsageError
from parkdet.runtime.geometry import FloatArray, Letterbox
from parkdet.runtime.nms import NmsSettings, RankedCandidates, suppress_ranked
from parkdet.runtime.shards import REDO, ParquetColumns, read_table, shard_paths, write_table

if TYPE_CHECKING:
    import os

CANDIDATES_FOLDER = "candidates"
_KEY = "parkdet.candidates"
_VERSION = 1
_COLUMNS = ("x1", "y1", "x2", "y2", "score")
_LETTERBOX = tuple(f.name for f in dataclasses.fields(Letterbox))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageCandidates:
    """What entered one image's NMS, best first."""

    image_id: int
    letterbox: Letterbox
    settings: NmsSettings
    """With which they were chosen. A higher `conf` selects from them exactly; a lower one has lost some."""
    xyxy: FloatArray
    """(K, 4) canvas pixels."""
    scores: FloatArray
    category_ids: NDArray[np.int32]

    def detections(
        self, *, conf: float | None = None, iou: float | None = None, max_det: int | None = None,
        agnostic: bool | None = None,
    ) -> tuple[FloatArray, FloatArray, NDArray[np.int32]]:  # fmt: skip
        """NMS with other settings: boxes (N, 4) xyxy in image pixels, scores (N,), category ids (N,), best first.

        What is not given stays as it was in the run; all of it as it was gives the run's own predictions.
        ValueError for a `conf` below the run's, or settings that cannot be.
        """
        changes = {"conf": conf, "iou": iou, "max_det": max_det, "agnostic": agnostic}
        settings = dataclasses.replace(self.settings, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]
        if settings.conf < self.settings.conf:
            raise ValueError(f"conf {settings.conf} is below the {self.settings.conf} of the candidates")
        # Best first, so the ones above a threshold stand in front.
        count = int(np.count_nonzero(self.scores > np.float32(settings.conf)))
        ranked = RankedCandidates(
            self.xyxy[:count], self.scores[:count], self.category_ids[:count], np.arange(count), count
        )
        on_canvas, _ = suppress_ranked(ranked, settings)
        found, _ = on_canvas.moved(self.letterbox.to_image(on_canvas.xyxy))
        return found.xyxy, found.scores, found.class_ids


def read_candidates(run: str | os.PathLike[str]) -> Iterator[ImageCandidates]:
    """The candidates of every image of a run, shard by shard: one shard is in memory at a time.

    UsageError when the run kept none; ArtifactError names a shard that is damaged.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder")
    paths = shard_paths(folder / CANDIDATES_FOLDER)
    if not paths:
        raise UsageError(f"{folder}: keeps no candidates; make it with 'parkdet infer --keep-candidates'")
    return (image for path in paths for image in read_candidate_shard(path))


def read_candidate_shard(path: Path) -> list[ImageCandidates]:
    """One shard, checked. ArtifactError when it is damaged or none of ours."""
    table = read_table(path)
    metadata = table.schema.metadata or {}
    if _KEY.encode() not in metadata or not table.schema.equals(_columns().schema(), check_metadata=False):
        raise ArtifactError(f"{path}: is not a shard of candidates")
    try:
        values = json.loads(metadata[_KEY.encode()])
        if values["version"] != _VERSION:
            raise ArtifactError(f"{path}: is a shard of version {values['version']}, this is {_VERSION}")
        settings = NmsSettings(**values["nms"])
        images = [(int(i["image_id"]), int(i["candidates"]), _letterbox(i["letterbox"])) for i in values["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: its description of itself is damaged ({error})") from error
    ids = np.repeat([image_id for image_id, _, _ in images], [count for _, count, _ in images])
    if not np.array_equal(ids, table.column("image_id").to_numpy()):
        raise ArtifactError(f"{path}: its rows are not those that it describes; {REDO}")
    categories = table.column("category_id").to_numpy()
    numbers = np.stack([table.column(name).to_numpy() for name in _COLUMNS], axis=1)
    read, start = [], 0
    for image_id, count, letterbox in images:
        rows = slice(start, start + count)
        start += count
        read.append(
            ImageCandidates(
                image_id=image_id, letterbox=letterbox, settings=settings, xyxy=numbers[rows, :4],
                scores=numbers[rows, 4], category_ids=categories[rows],
            )
        )  # fmt: skip
    return read


def write_candidate_shard(path: Path, images: Sequence[ImageCandidates]) -> None:
    """Write the candidates of a shard's images; on the disk when this returns. ParkdetError when it cannot be."""
    counts = [len(image.scores) for image in images]
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(image.xyxy for image in images)])
    columns = [
        np.repeat(np.array([image.image_id for image in images], np.int64), counts),
        np.concatenate([np.zeros(0, np.int32), *(image.category_ids for image in images)]),
        *boxes.T,
        np.concatenate([np.zeros(0, np.float32), *(image.scores for image in images)]),
    ]
    description = {
        "version": _VERSION,
        "nms": dataclasses.asdict(images[0].settings if images else NmsSettings()),
        "images": [
            {"image_id": i.image_id, "candidates": n, "letterbox": dataclasses.asdict(i.letterbox)}
            for i, n in zip(images, counts, strict=True)
        ],
    }
    write_table(path, _columns(), columns, {_KEY: json.dumps(description)})


def _columns() -> ParquetColumns:
    return ParquetColumns(_COLUMNS)


def _letterbox(values: Mapping[str, Any]) -> Letterbox:
    """A letterbox from its fields as JSON has them; KeyError, TypeError or ValueError where they are not."""
    fields = {n: tuple(map(int, v)) if isinstance(v := values[n], list) else int(v) for n in _LETTERBOX}
    return Letterbox(**fields)  # type: ignore[arg-type]
