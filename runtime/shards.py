"""One shard of predictions: a Parquet file that exists whole or not at all, and describes itself.

Rows are detections, `image_id, category_id, x, y, w, h, score` in original pixels. The metadata has, under
`parkdet.shard`, JSON: the run's fingerprint, the images covered with or without detections, those that could
not be read, and what the caps cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.errors import ArtifactError, ParkdetError
from parkdet.runtime.geometry import FloatArray

if TYPE_CHECKING:
    from parkdet.runtime.candidates import ImageCandidates

SHARD_KEY = "parkdet.shard"
_VERSION = 1
_COLUMNS = ("x", "y", "w", "h", "score")
REDO = "the same 'parkdet infer' again does its images anew"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResult:
    """One image's detections as they are stored, best first."""

    image_id: int
    file_bytes: int
    """Size of the image's file: by it a later run sees that the file was replaced."""
    xywh: FloatArray
    """(N, 4): left, top, width, height in original pixels."""
    scores: FloatArray
    """(N,)"""
    category_ids: NDArray[np.int32]
    """(N,): the data set's own ids."""
    plan: str = ""
    """By which of several plans it was run; empty where there is one only."""
    candidates: ImageCandidates | None = None
    """What entered NMS, where the run keeps it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedImage:
    """An image without a result, and why."""

    image_id: int
    file_name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CapCounts:
    """What was cut off, over any number of images."""

    over_limit: int = 0
    """Candidates beyond the most that one image's NMS takes."""
    at_max_det: int = 0
    """Images whose detections reached max_det with candidates left."""
    without_area: int = 0
    """Boxes that had no area inside the image, and were dropped."""
    clipped: int = 0
    """Boxes that reached over the image's edge, and were cut there."""

    def __add__(self, other: CapCounts) -> CapCounts:
        return CapCounts(
            over_limit=self.over_limit + other.over_limit,
            at_max_det=self.at_max_det + other.at_max_det,
            without_area=self.without_area + other.without_area,
            clipped=self.clipped + other.clipped,
        )


@dataclass(frozen=True, slots=True)
class Shard:
    path: Path
    fingerprint: dict[str, Any]
    covered: tuple[int, ...]
    """Ids of the images with a result."""
    file_bytes: tuple[int, ...]
    """Size of each covered image's file when it was read."""
    failed: tuple[FailedImage, ...]
    caps: CapCounts
    rows: int
    plans: dict[str, tuple[int, ...]]
    """Covered images by the plan that they were run by; empty where there was one only."""


def shard_paths(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.glob("part-*.parquet") if path.stem[5:].isdecimal()),
        key=lambda path: int(path.stem[5:]),
    )


@dataclass(frozen=True, slots=True)
class ParquetColumns:
    """The columns of a shard: image id, category id, and float32 columns of these names."""

    floats: tuple[str, ...]

    def schema(self) -> Any:
        """As pyarrow has it."""
        import pyarrow as pa

        floats = [(name, pa.float32()) for name in self.floats]
        return pa.schema([("image_id", pa.int64()), ("category_id", pa.int32()), *floats])


_SCHEMA = ParquetColumns(_COLUMNS)


def write_table(
    path: Path, columns: ParquetColumns, values: Sequence[NDArray[Any]], metadata: Mapping[str, str]
) -> None:
    """Write a Parquet file with page checksums; on the disk when this returns. ParkdetError when it cannot be."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = columns.schema().with_metadata(dict(metadata))
    table = pa.table([pa.array(column) for column in values], schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_atomically(path, sink.getvalue().to_pybytes())


def read_table(path: Path) -> Any:
    """The shard's rows as a pyarrow table with its metadata, checksums verified."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # ParquetFile, because read_table hands a single file to the dataset reader, which skips checksums.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read()
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(f"{path}: is damaged or cut off ({str(error).splitlines()[0]}); {REDO}") from error


def read_shard(path: Path) -> Shard:
    """Read and check a whole shard. ArtifactError when it is damaged or none of ours."""
    table = read_table(path)
    metadata = table.schema.metadata or {}
    if SHARD_KEY.encode() not in metadata or not table.schema.equals(_SCHEMA.schema(), check_metadata=False):
        raise ArtifactError(f"{path}: is not a shard of predictions")
    try:
        values = json.loads(metadata[SHARD_KEY.encode()])
        if values["version"] != _VERSION:
            raise ArtifactError(f"{path}: is a shard of version {values['version']}, this is {_VERSION}")
        shard = Shard(
            path,
            dict(values["fingerprint"]),
            tuple(map(int, values["covered"])),
            tuple(map(int, values["file_bytes"])),
            tuple(FailedImage(**image) for image in values["failed"]),
            CapCounts(**values["caps"]),
            table.num_rows,
            {str(plan): tuple(map(int, ids)) for plan, ids in values.get("plans", {}).items()},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: its description of itself is damaged ({error})") from error
    if len(shard.file_bytes) != len(shard.covered):
        raise ArtifactError(f"{path}: its description of itself contradicts itself")
    if not set(table.column("image_id").unique().to_pylist()) <= set(shard.covered):
        raise ArtifactError(f"{path}: has rows of images that it does not cover")
    return shard


def write_shard(
    path: Path,
    fingerprint: Mapping[str, Any],
    results: Sequence[ImageResult],
    failed: Sequence[FailedImage],
    caps: CapCounts,
) -> Shard:
    """Write a shard, its rows in the order of `results`; it is on the disk when this returns.

    ParkdetError when it cannot be written; nothing is left of it then.
    """
    counts = [len(result.scores) for result in results]
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(result.xywh for result in results)])
    columns = [
        np.repeat(np.array([result.image_id for result in results], np.int64), counts),
        np.concatenate([np.zeros(0, np.int32), *(result.category_ids for result in results)]),
        *boxes.T,
        np.concatenate([np.zeros(0, np.float32), *(result.scores for result in results)]),
    ]
    shard = Shard(
        path,
        dict(fingerprint),
        tuple(result.image_id for result in results),
        tuple(result.file_bytes for result in results),
        tuple(failed),
        caps,
        sum(counts),
        _by_plan(results),
    )
    description = {
        "version": _VERSION,
        "fingerprint": shard.fingerprint,
        "covered": shard.covered,
        "file_bytes": shard.file_bytes,
        "failed": [asdict(image) for image in failed],
        "caps": asdict(caps),
        "plans": shard.plans,
    }
    write_table(path, _SCHEMA, columns, {SHARD_KEY: json.dumps(description)})
    return shard


def _by_plan(results: Sequence[ImageResult]) -> dict[str, tuple[int, ...]]:
    plans = dict.fromkeys(result.plan for result in results if result.plan)
    return {plan: tuple(result.image_id for result in results if result.plan == plan) for plan in plans}


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it exists whole or not at all. ParkdetError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ParkdetError(
            f"{path}: cannot be written ({error.strerror or error}); make room or mend it, and run it again: "
            "what is finished is kept"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
