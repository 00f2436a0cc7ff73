"""What a training shows and keeps: YOLOv5's progress lines, results.csv, TensorBoard events."""

from __future__ import annotations

import csv
import io
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import torch

from parkdet.runtime.geometry import ImageArray
from parkdet.train.validate import Validation

PLAIN_LINE_SECONDS = 10.0
"""Without a terminal, one line so often."""

COLUMNS = (
    "epoch",
    "train/box_loss",
    "train/obj_loss",
    "train/cls_loss",
    "metrics/precision",
    "metrics/recall",
    "metrics/mAP_0.5",
    "metrics/mAP_0.5:0.95",
    "val/box_loss",
    "val/obj_loss",
    "val/cls_loss",
    "x/lr0",
    "x/lr1",
    "x/lr2",
    "metrics/mAP_0.75",
)
"""YOLOv5's, and after them what the contest's metric is made of."""
_HEADER = ("Epoch", "GPU_mem", "box_loss", "obj_loss", "cls_loss", "Instances", "Size")


class EpochLine:
    """The line of one epoch: rewritten in place on a terminal, printed now and then elsewhere."""

    def __init__(self, epoch: int, epochs: int, batches: int):
        self._label, self._batches = f"{epoch}/{epochs - 1}", batches
        self._terminal = sys.stderr.isatty()
        self._started = time.monotonic()
        # A line at once would say nothing: the first comes after its time.
        self._last_plain = self._started
        print("\n" + "".join(f"{word:>11}" for word in _HEADER), file=sys.stderr)

    def update(self, batch: int, losses: Sequence[float], instances: int, size: int) -> None:
        """Batch `batch` of the epoch, counted from 1, is done; `losses` are the epoch's means so far."""
        last = batch >= self._batches
        now = time.monotonic()
        if not self._terminal and not last and now - self._last_plain < PLAIN_LINE_SECONDS:
            return
        self._last_plain = now
        words = [self._label, _gpu_memory(), *(f"{loss:.4g}" for loss in losses), str(instances), str(size)]
        elapsed = now - self._started
        line = "".join(f"{word:>11}" for word in words) + f"  {batch}/{self._batches} {elapsed:.0f}s"
        end = "\n" if last or not self._terminal else ""
        print(f"\r{line}" if self._terminal else line, end=end, file=sys.stderr, flush=True)


def _gpu_memory() -> str:
    used = torch.cuda.memory_reserved() / 1e9 if torch.cuda.is_available() else 0
    return f"{used:.3g}G"


class EventsFile:
    """TensorBoard's view of results.csv: `tensorboard --logdir runs/train`.

    Written at once, by no thread of its own. What cannot be written is said once through `say`, and the training goes
    on without.
    """

    def __init__(self, folder: Path, first_epoch: int, say: Callable[[str], None]):
        from tensorboard.compat.proto.event_pb2 import SessionLog

        # The seconds are what TensorBoard sorts a run's sessions by.
        self.path = folder / f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{time.time_ns():x}"
        self._say, self._failed = say, False
        self._write(file_version="brain.Event:2")
        if first_epoch:
            # A resumed run draws its epochs again; those that the stopped one drew are to go.
            self._write(session_log=SessionLog(status=SessionLog.START), step=first_epoch)

    def add(self, row: Mapping[str, float]) -> None:
        """One epoch's row of results.csv, as `ResultsFile.add` returns it."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != "epoch"]
        self._write(summary=Summary(value=values), step=int(row["epoch"]))

    def add_picture(self, name: str, picture: ImageArray, epoch: int) -> None:
        """A BGR picture (h, w, 3) uint8; kept as JPEG, a tenth of what torch's writer would make of it."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width = picture.shape[:2]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=jpeg(picture))
        self._write(summary=Summary(value=[Summary.Value(tag=name, image=image)]), step=epoch)

    def _write(self, **content: Any) -> None:
        """Append an event. After a failure nothing more: TensorBoard reads to the first record that is not whole."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._failed:
            return
        try:
            with self.path.open("ab") as file:
                RecordWriter(file).write(Event(wall_time=time.time(), **content).SerializeToString())
        except OSError as error:
            self._failed = True
            reason = error.strerror or str(error)
            self._say(f"warning: {self.path}: {reason}; TensorBoard will see no more of this session, all else goes on")


def jpeg(picture: ImageArray) -> bytes:
    """The BGR picture (h, w, 3) uint8 as a JPEG file."""
    _, encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92])
    return encoded.tobytes()


class ResultsFile:
    """results.csv with YOLOv5's columns: one row an epoch."""

    def __init__(self, path: Path):
        self.path = path

    def keep_before(self, epoch: int) -> None:
        """Drop rows of `epoch` and later: a resumed run writes them again."""
        if not self.path.exists():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
        # A row that a kill cut off has too few fields.
        kept = [row for row in rows[1:] if len(row) == len(COLUMNS) and row[0].isdigit() and int(row[0]) < epoch]
        self._replace(kept)

    def add(
        self,
        epoch: int,
        losses: Sequence[float],
        validation: Validation | None,
        rates: Sequence[float],
    ) -> dict[str, float]:
        """Append an epoch's row; where there was no validation its columns are empty. Returns the row."""
        metrics: list[float | None] = [None] * 7
        map75 = None
        if validation is not None:
            measured = validation.evaluation
            metrics = [measured.precision, measured.recall, measured.map50, measured.map, *validation.losses]
            map75 = measured.map75
        values = dict(zip(COLUMNS, [epoch, *losses, *metrics, *rates, map75], strict=True))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(COLUMNS)
            writer.writerow([epoch, *("" if v is None else f"{v:.6g}" for v in list(values.values())[1:])])
            file.flush()
            os.fsync(file.fileno())
        return {name: float(value) for name, value in values.items() if value is not None}

    def _replace(self, rows: Sequence[Sequence[str]]) -> None:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(text.getvalue(), encoding="utf-8")
        temporary.replace(self.path)
