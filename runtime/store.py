"""A run folder's predictions: shards, written one after the other, locked, repaired and read together.

A run folder holds `run.json` (the fingerprint: what must be equal for two runs to be one), `.lock`, and
`predictions/part-00000.parquet`, `part-00001.parquet`, ... (see `shards.py`); with candidates kept, also
`candidates/part-00000.parquet`, ... (see `candidates.py`).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from parkdet.runtime.candidates import CANDIDATES_FOLDER, read_candidate_shard, write_candidate_shard
from parkdet.runtime.errors import ArtifactError, InUseError, UsageError
from parkdet.runtime.shards import (
    REDO,
    CapCounts,
    FailedImage,
    ImageResult,
    Shard,
    read_shard,
    read_table,
    shard_paths,
    write_atomically,
    write_shard,
)

if TYPE_CHECKING:
    import polars as pl

FOLDER = "predictions"
RUN_FILE = "run.json"

Fingerprint = Mapping[str, str | int | float | bool]
"""Model, settings and image list of a run. Keys are the words that a message about a difference uses."""

IMAGES_FILE = "images.json"
"""In the folder of a run over a plain folder of images: the ids that it gave them."""


def image_list_digest(images: Iterable[tuple[int, str]]) -> str:
    """SHA-256 of an image list, ids and file names in its order: a fingerprint's `image_list`."""
    total = hashlib.sha256()
    for image_id, file_name in images:
        total.update(f"{image_id}\0{file_name}\n".encode("utf-8", "surrogatepass"))
    return total.hexdigest()


@dataclass(slots=True)
class _Contents:
    """What a set of shards holds together."""

    shards: list[Shard] = field(default_factory=list)
    file_bytes: dict[int, int] = field(default_factory=dict)
    """File size by id, of the images with a result."""
    failed: dict[int, FailedImage] = field(default_factory=dict)
    caps: CapCounts = field(default_factory=CapCounts)
    rows: int = 0
    plans: dict[str, int] = field(default_factory=dict)
    """Images by the plan that they were run by."""

    def add(self, shard: Shard) -> None:
        self.shards.append(shard)
        self.file_bytes.update(zip(shard.covered, shard.file_bytes, strict=True))
        self.failed.update((image.image_id, image) for image in shard.failed)
        for image_id in self.file_bytes.keys() & self.failed.keys():  # read at the second attempt
            del self.failed[image_id]
        self.caps += shard.caps
        self.rows += shard.rows
        for plan, ids in shard.plans.items():
            self.plans[plan] = self.plans.get(plan, 0) + len(ids)


class RunStore:
    """One process's hold on a run folder: locked, repaired, ready for the next shard. Used with `with`.

    Opening removes what a killed run left, and shards that are damaged: their images count as not done.
    UsageError when the folder holds another fingerprint, InUseError when another process has it.
    """

    def __init__(
        self,
        run_folder: str | os.PathLike[str],
        fingerprint: Fingerprint,
        file_bytes: Mapping[int, int] | None = None,
        keep_candidates: bool = False,
    ) -> None:
        """`file_bytes`: today's size of the image files by id; a file replaced since makes another run.

        With `keep_candidates` every result that is written must have them, and a shard counts as done only
        where its candidates are there too.
        """
        self.run_folder = Path(run_folder)
        self._keep_candidates = keep_candidates
        self._file_bytes = dict(file_bytes or {})
        self.fingerprint = dict(fingerprint)
        self.messages: list[str] = []
        """What was repaired on opening, for the user to read."""
        self._contents = _Contents()
        self._lock: int | None = None

    @property
    def covered(self) -> set[int]:
        """Ids of the images that have a result, with or without detections."""
        return set(self._contents.file_bytes)

    @property
    def failed(self) -> list[FailedImage]:
        """Images that could not be read and have no result, by id."""
        return [image for _, image in sorted(self._contents.failed.items())]

    @property
    def caps(self) -> CapCounts:
        """What was cut off, over all shards."""
        return self._contents.caps

    @property
    def detections(self) -> int:
        """Rows of all shards."""
        return self._contents.rows

    @property
    def plans(self) -> dict[str, int]:
        """Images by the plan that they were run by; empty where there was one only."""
        return dict(self._contents.plans)

    def __enter__(self) -> Self:
        folder = self.run_folder / FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.run_folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # a full disk is no mistake of the command line
            raise UsageError(f"{folder}: cannot be written ({error.strerror}); choose another --project") from error
        try:
            self._open(folder)
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._unlock()

    def write(
        self, results: Sequence[ImageResult], failed: Sequence[FailedImage], caps: CapCounts | None = None
    ) -> Path:
        """Write one shard: its rows in the order of `results`. Returns when it is on the disk.

        ParkdetError when it cannot be written; the folder is then as it was.
        """
        ids = [result.image_id for result in results]
        if self._lock is None:
            raise ValueError(f"{self.run_folder}: the store is not open")
        if len(set(ids)) != len(ids) or self._contents.file_bytes.keys() & set(ids):
            raise ValueError(f"{self.run_folder}: an image would be stored twice")
        folder = self.run_folder / FOLDER
        last = max((int(path.stem[5:]) for path in shard_paths(folder)), default=-1)
        path = folder / f"part-{last + 1:05d}.parquet"
        if self._keep_candidates:
            # First, so that a shard of predictions never stands without them.
            kept = [result.candidates for result in results if result.candidates is not None]
            assert len(kept) == len(results), "a run that keeps candidates got a result without"
            (self.run_folder / CANDIDATES_FOLDER).mkdir(exist_ok=True)
            write_candidate_shard(self.run_folder / CANDIDATES_FOLDER / path.name, kept)
        shard = write_shard(path, self.fingerprint, results, failed, caps or CapCounts())
        self._contents.add(shard)
        return path

    def _open(self, folder: Path) -> None:
        beside = self.run_folder / CANDIDATES_FOLDER
        for leftover in (*folder.glob(".*.tmp"), *self.run_folder.glob(".*.tmp"), *beside.glob(".*.tmp")):
            leftover.unlink()
        sound: list[Shard] = []
        damaged: dict[Path, ArtifactError] = {}
        for path in shard_paths(folder):
            try:
                sound.append(read_shard(path))
            except ArtifactError as error:
                damaged[path] = error
        recorded = _run_file_fingerprint(self.run_folder)
        if recorded is None and sound:
            recorded = sound[0].fingerprint
        if recorded is not None and (differences := fingerprint_differences(recorded, self.fingerprint)):
            raise UsageError(
                f"{self.run_folder}: holds the predictions of another run: {'; '.join(differences)}. "
                "Choose another --name, or the settings of that run"
            )
        mine = _Contents()
        for shard in sound:
            if not fingerprint_differences(shard.fingerprint, self.fingerprint):
                mine.add(shard)
        if changed := changed_files(mine.file_bytes, self._file_bytes):
            raise UsageError(
                f"{self.run_folder}: {changed} image files were replaced since their predictions were made; "
                "choose another --name"
            )
        # Only now is it known that the folder is ours to repair.
        if self._keep_candidates:
            damaged |= {shard.path: damage for shard in mine.shards if (damage := self._candidates_damage(shard))}
            sound = [shard for shard in sound if shard.path not in damaged]
        self._repair(sound, damaged)
        text = json.dumps({"version": 1, "fingerprint": self.fingerprint}, indent=1, ensure_ascii=False)
        if _run_file_fingerprint(self.run_folder) is None:
            write_atomically(self.run_folder / RUN_FILE, (text + "\n").encode())

    def _repair(self, sound: Sequence[Shard], damaged: Mapping[Path, ArtifactError]) -> None:
        """Take in the sound shards of this run, remove the damaged ones, move those of others aside."""
        for path, damage in damaged.items():
            path.unlink()
            self.messages.append(f"{damage}; removed, its images are done again")
        for shard in sound:
            if fingerprint_differences(shard.fingerprint, self.fingerprint):
                aside = shard.path.with_name(shard.path.name + ".foreign")
                shard.path.rename(aside)
                self.messages.append(f"{shard.path}: is a shard of another run; moved aside to {aside.name}")
            elif self._contents.file_bytes.keys() & set(shard.covered):
                shard.path.unlink()
                self.messages.append(f"{shard.path}: covers images that another shard has; removed")
            else:
                self._contents.add(shard)
        names = {shard.path.name for shard in self._contents.shards}
        for path in shard_paths(self.run_folder / CANDIDATES_FOLDER):
            if path.name not in names:
                path.unlink()

    def _candidates_damage(self, shard: Shard) -> ArtifactError | None:
        """Why the candidates of a shard are not there."""
        path = self.run_folder / CANDIDATES_FOLDER / shard.path.name
        try:
            covered = tuple(image.image_id for image in read_candidate_shard(path))
        except ArtifactError as error:
            return error
        return None if covered == shard.covered else ArtifactError(f"{path}: is not of {shard.path.name}'s images")

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def read_predictions(run: str | os.PathLike[str]) -> pl.DataFrame:
    """All detections of a run: image_id, category_id, x, y, w, h, score in original pixels.

    Ordered by image id, best score first within an image: the same table however the run was cut into shards.
    UsageError when there are no predictions; ArtifactError names a shard that is damaged or of another run.
    """
    import polars as pl
    import pyarrow as pa

    shards = sound_shards(run)
    table = pa.concat_tables([read_table(shard.path) for shard in shards])
    frame = pl.from_arrow(table.replace_schema_metadata(None))
    assert isinstance(frame, pl.DataFrame)
    return frame.sort("image_id", maintain_order=True)


def covered_images(run: str | os.PathLike[str]) -> set[int]:
    """Ids of the images that have a result, with or without detections. Raises as `read_predictions`."""
    return {image_id for shard in sound_shards(run) for image_id in shard.covered}


def failed_images(run: str | os.PathLike[str]) -> list[FailedImage]:
    """Images without a result and why, by id. Raises as `read_predictions`."""
    contents = _Contents()
    for shard in sound_shards(run):
        contents.add(shard)
    return [image for _, image in sorted(contents.failed.items())]


def plans_of_images(run: str | os.PathLike[str]) -> dict[int, str]:
    """By which plan each covered image was run; empty where there was one only. Raises as `read_predictions`."""
    return {
        image_id: plan
        for shard in sound_shards(run)
        for plan, image_ids in shard.plans.items()
        for image_id in image_ids
    }


def read_fingerprint(run: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The fingerprint of a run folder; None where no run has begun in it."""
    recorded = _run_file_fingerprint(Path(run))
    if recorded is not None:
        return recorded
    for path in shard_paths(Path(run) / FOLDER):
        with suppress(ArtifactError):
            return read_shard(path).fingerprint
    return None


def recorded_file_bytes(run: str | os.PathLike[str]) -> dict[int, int]:
    """File size by id of the images that a run folder covers; damaged shards are passed over."""
    contents = _Contents()
    for path in shard_paths(Path(run) / FOLDER):
        with suppress(ArtifactError):
            contents.add(read_shard(path))
    return contents.file_bytes


def changed_files(there: Mapping[int, int], here: Mapping[int, int]) -> int:
    """How many images that both know have files of another size; a file that is gone (-1) is no other file."""
    return sum(here.get(image_id, -1) not in (size, -1) for image_id, size in there.items())


def fingerprint_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, a phrase each; empty when they are equal."""
    return [
        f"{key.replace('_', ' ')} {_short(there.get(key, 'none'))} there, {_short(here.get(key, 'none'))} here"
        for key in sorted({*there, *here})
        if json.dumps(there.get(key)) != json.dumps(here.get(key))
    ]


def _short(value: object) -> object:
    """A checksum's first digits; anything else as it is."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else value


def _locked(run_folder: Path) -> int:
    """Descriptor that holds the folder's lock until it is closed, also by a kill."""
    descriptor = os.open(run_folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise InUseError(
            f"{run_folder}: another process{f' ({owner})' if owner else ''} is writing predictions here; "
            "wait for it, or choose another --name"
        ) from None
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"pid {os.getpid()}\n".encode(), 0)
    return descriptor


def _run_file_fingerprint(run_folder: Path) -> dict[str, Any] | None:
    try:
        values = json.loads((run_folder / RUN_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    fingerprint = values.get("fingerprint") if isinstance(values, dict) else None
    return fingerprint if isinstance(fingerprint, dict) else None


def sound_shards(run: str | os.PathLike[str]) -> list[Shard]:
    """The shards of a run folder, or of the predictions folder inside it, checked."""
    folder = Path(run)
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder")
    if (folder / FOLDER).is_dir():
        folder /= FOLDER
    shards = [read_shard(path) for path in shard_paths(folder)]
    if not shards:
        raise UsageError(f"{run}: holds no predictions; make them with 'parkdet infer'")
    seen: set[int] = set()
    for shard in shards:
        if differences := fingerprint_differences(shards[0].fingerprint, shard.fingerprint):
            raise ArtifactError(
                f"{shard.path}: is of another run than {shards[0].path.name}: {'; '.join(differences)}; {REDO}"
            )
        if seen.intersection(shard.covered):
            raise ArtifactError(f"{shard.path}: covers images that another shard has; {REDO}")
        seen.update(shard.covered)
    return shards
