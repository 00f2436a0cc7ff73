"""What `parkdet infer` tells at its end: to the user, in report.json, and by its exit code."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click

from parkdet.runtime.errors import DataError, GateError, Interrupted
from parkdet.runtime.pipeline import STAGES, PipelineReport
from parkdet.runtime.shards import CapCounts, FailedImage, write_atomically

EXAMPLES = 5
"""Failed images that a message names."""
REPORT_FILE = "report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class InferReport:
    """What a run folder holds after `run_inference`."""

    folder: Path
    images: int
    """Images asked for."""
    already: int
    """Images that had a result before this run."""
    covered: int
    """Images with a result now."""
    detections: int
    failed: tuple[FailedImage, ...]
    """Images that could not be read, by id."""
    caps: CapCounts
    plans: dict[str, int]
    """With a deadline, images by the plan that they were run by, best plan first."""
    deadline_s: float | None = None
    work: PipelineReport | None = field(repr=False)
    """This run's part; None when there was nothing to do."""

    @property
    def not_done(self) -> int:
        """Images that have no result and were not found unreadable."""
        return self.images - self.covered - len(self.failed)

    def raise_unfinished(self) -> None:
        """Interrupted when the run was stopped, GateError when the deadline was, DataError for unreadable images."""
        if self.work is not None and self.work.interrupted:
            raise Interrupted(
                f"{self.folder}: stopped with {self.covered} of {self.images} images done and saved; "
                "the same command goes on from there"
            )
        if self.work is not None and self.work.out_of_time:
            raise GateError(
                f"{self.folder}: the deadline came with {self.not_done} of {self.images} images not done, though the "
                f"cheapest plan was used; the others are saved. Give --deadline more time and the same command "
                "goes on, or name a faster model"
            )
        if self.failed:
            raise DataError(self._failures())

    def print(self) -> None:
        """The summary, on stdout."""
        click.echo(
            f"Images: {self.covered} of {self.images} with a result"
            + (f" ({self.already} before this run)" if self.already else "")
            + f", {len(self.failed)} could not be read"
            + (f", {self.not_done} not done" if self.not_done else "")
            + f". Detections: {self.detections}."
        )
        caps = self.caps
        click.echo(
            f"Cut off: {caps.over_limit} candidates over the limit, {caps.at_max_det} images at --max-det, "
            f"{caps.without_area} boxes without area. Boxes clipped at the image's edge: {caps.clipped}."
        )
        for plan, images in self.plans.items():
            click.echo(f"Plan: {images} images, {plan}")
        work = self.work
        if work is None or not work.done:
            return
        times = ", ".join(f"{stage} {work.times.seconds[stage]:.2f}" for stage in STAGES)
        click.echo(
            f"Time: {work.seconds:.1f} s, {work.done / work.seconds:.1f} images/s. "
            f"Seconds of work by stage: {times}. Bottleneck: {work.times.bottleneck()}."
        )

    def write(self) -> None:
        """report.json in the run folder: the same, for programs."""
        work = self.work
        content = {
            "images": self.images,
            "with_result": self.covered,
            "before_this_run": self.already,
            "not_done": self.not_done,
            "failed": [asdict(image) for image in self.failed],
            "detections": self.detections,
            "cut_off": asdict(self.caps),
            "plans": self.plans,
            "deadline_s": self.deadline_s,
            "this_run": None
            if work is None
            else {
                "done": work.done,
                "seconds": round(work.seconds, 3),
                "stage_seconds": {stage: round(seconds, 3) for stage, seconds in work.times.seconds.items()},
                "stage_threads": work.times.lanes,
                "bottleneck": work.times.bottleneck(),
            },
        }
        text = json.dumps(content, ensure_ascii=False, indent=1)
        # A byte of a name that is no UTF-8 becomes JSON's \udcXX.
        write_atomically(self.folder / REPORT_FILE, (text + "\n").encode("utf-8", "backslashreplace"))

    def _failures(self) -> str:
        examples = "".join(f"\n  {image.file_name}: {image.reason}" for image in self.failed[:EXAMPLES])
        more = (
            f"\n  ... and {len(self.failed) - EXAMPLES} more, all in {self.folder / REPORT_FILE}"
            if len(self.failed) > EXAMPLES
            else ""
        )
        return (
            f"{self.folder}: {len(self.failed)} of {self.images} images could not be read; the others are done. "
            f"Mend or replace them and run the same command again:{examples}{more}"
        )
