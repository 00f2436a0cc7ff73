"""What `parkdet infer` does: artifact and images to a run folder, going on where an equal run stopped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import click

from parkdet.runtime.backends.base import Backend, Precision, open_backend, resolve_artifact
from parkdet.runtime.backends.compiled_cache import artifact_digest
from parkdet.runtime.contest import ContestData
from parkdet.runtime.errors import DataError, Interrupted, UsageError
from parkdet.runtime.images import list_images
from parkdet.runtime.loading import ImageItem
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.nms import NmsSettings
from parkdet.runtime.pipeline import (
    STAGES,
    Pipeline,
    PipelineReport,
    PipelineSettings,
)
from parkdet.runtime.run_folder import next_run_folder
from parkdet.runtime.shards import CapCounts, FailedImage, write_atomically
from parkdet.runtime.split import split_ids
from parkdet.runtime.store import (
    Fingerprint,
    RunStore,
    changed_files,
    fingerprint_differences,
    read_fingerprint,
    recorded_file_bytes,
)
from parkdet.runtime.terminal import progress, quiet_decoders, stop_signals

EXAMPLES = 5
"""Failed images that a message names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferOptions:
    """What `parkdet infer` was asked for; the defaults are the contest's."""

    data: Path | None = None
    """A data set in the contest's layout."""
    split: str = "test"
    """Which images of it: `test`, `train` (all that have labels), or `val`, those held out of the training."""
    source: Path | None = None
    """Instead of `data`: a folder of images, or one image."""
    imgsz: int | None = None
    """Length of the long side; the model's own when None."""
    batch_size: int = 1
    conf: float | None = None
    """Post-processing; what the model was validated with when None."""
    iou: float | None = None
    max_det: int | None = None
    multi_label: bool = True
    agnostic: bool = False
    backend: str | None = None
    threads: int | None = None
    device: str | None = None
    precision: Precision | None = None
    project: Path = Path("runs/detect")
    name: str = "exp"
    exist_ok: bool = False
    fresh: bool = False
    """Begin a new run even where an equal one could be continued."""
    keep_candidates: bool = False
    """Store what entered NMS too."""


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
    work: PipelineReport | None = field(repr=False)
    """This run's part; None when there was nothing to do."""

    def raise_unfinished(self) -> None:
        """Interrupted when the run was stopped, DataError naming examples when images could not be read."""
        if self.work is not None and self.work.interrupted:
            raise Interrupted(
                f"{self.folder}: stopped with {self.covered} of {self.images} images done and saved; "
                "the same command goes on from there"
            )
        if self.failed:
            raise DataError(_failures(self))


def run_inference(artifact: Path, options: InferOptions) -> InferReport:
    """Detect in all images asked for and store the predictions; go on with an equal run that is not finished.

    Prints the run folder first and last on stdout, progress on stderr. Images that could not be read and a stop
    by signal are told in the report: raise them with `InferReport.raise_unfinished`. UsageError, ArtifactError,
    DataError and InUseError as their classes say.
    """
    if (options.data is None) == (options.source is None):
        raise UsageError("give the images with --data or with --source, one of the two")
    if options.fresh and options.exist_ok:
        raise UsageError("--fresh begins a new folder and --exist-ok keeps to one: give one of the two")
    path = resolve_artifact(artifact)
    items = _images(options)
    with open_backend(path, options.backend, options.device, options.threads, precision=options.precision) as backend:
        if options.split == "val":
            items = _held_out(items, backend.spec)
        nms = _nms_settings(options, backend.spec)
        settings = PipelineSettings(
            nms=nms,
            imgsz=options.imgsz or backend.spec.imgsz,
            batch_size=options.batch_size,
            keep_candidates=options.keep_candidates,
        )
        pipeline = Pipeline(backend, settings)
        fingerprint = fingerprint_of(backend, settings, items)
        file_bytes = {item.image_id: item.file_bytes() for item in items}
        folder = _run_folder(options, fingerprint, file_bytes)
        click.echo(f"Run folder: {folder}")
        click.echo(
            f"model: {path.name} on {backend.name} in {backend.precision}, long side {settings.imgsz} px, "
            f"conf {nms.conf:g}, IoU {nms.iou:g}, at most {nms.max_det} an image",
            err=True,
        )
        with RunStore(folder, fingerprint, file_bytes, settings.keep_candidates) as store:
            for message in store.messages:
                click.echo(message, err=True)
            already = len(store.covered)
            if options.source is not None:
                _write_image_list(folder, items)
            work = None
            if already == len(items):
                click.echo(
                    f"All {already} images are there already; nothing to do. A new run begins with --fresh.",
                    err=True,
                )
            else:
                if already or store.failed:
                    click.echo(f"{already} of {len(items)} images are there already; going on.", err=True)
                with quiet_decoders(), stop_signals() as stop, progress() as tell:
                    work = pipeline.run(items, store, stop=stop, on_progress=tell)
            report = InferReport(
                folder=folder, images=len(items), already=already, covered=len(store.covered),
                detections=store.detections, failed=tuple(store.failed), caps=store.caps, work=work,
            )  # fmt: skip
    _print_summary(report)
    click.echo(f"Run folder: {folder}")
    return report


def _nms_settings(options: InferOptions, spec: ModelSpec) -> NmsSettings:
    try:
        return NmsSettings(
            conf=spec.conf if options.conf is None else options.conf,
            iou=spec.iou if options.iou is None else options.iou,
            max_det=spec.max_det if options.max_det is None else options.max_det,
            multi_label=options.multi_label,
            agnostic=options.agnostic,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def fingerprint_of(backend: Backend, settings: PipelineSettings, items: list[ImageItem]) -> Fingerprint:
    """What must be equal for two runs to be one: model, settings, image list."""
    images = hashlib.sha256()
    for item in items:
        images.update(f"{item.image_id}\0{item.file_name}\n".encode("utf-8", "surrogateescape"))
    nms = settings.nms
    return {
        "model": artifact_digest(backend.path),
        "backend": backend.name,
        "precision": backend.precision,
        "imgsz": settings.imgsz,
        "conf": nms.conf,
        "iou": nms.iou,
        "max_det": nms.max_det,
        "multi_label": nms.multi_label,
        "agnostic": nms.agnostic,
        "keep_candidates": settings.keep_candidates,
        "image_list": images.hexdigest(),
        "images": len(items),
    }


def _images(options: InferOptions) -> list[ImageItem]:
    if options.source is not None:
        if options.split != "test":
            raise UsageError(f"--split {options.split} is a part of a data set: give the data set with --data")
        return [
            ImageItem(image_id=number, file_name=path.name, path=path)
            for number, path in enumerate(list_images(options.source), start=1)
        ]
    assert options.data is not None
    data = ContestData(options.data)
    listed = data.test_list() if options.split == "test" else data.train_labels().images
    return [
        ImageItem(
            image_id=record.image_id,
            file_name=record.file_name,
            path=record.path,
            problem=f"has no file in {listed.folder} ({match.value})",
        )
        for record, match in zip(listed.records, listed.matches, strict=True)
    ]


def _held_out(items: list[ImageItem], spec: ModelSpec) -> list[ImageItem]:
    """Those that validated when the model was trained, in the order of the list."""
    val_ids = set(split_ids([item.image_id for item in items], spec.split_seed, spec.split_count).val_ids)
    if not val_ids:
        raise UsageError(f"of {len(items)} images none is held out to validate on; run --split train or test")
    return [item for item in items if item.image_id in val_ids]


def _run_folder(options: InferOptions, fingerprint: Fingerprint, file_bytes: dict[int, int]) -> Path:
    """The folder of an equal run, to go on with; else a new one."""
    if not options.exist_ok and not options.fresh:
        existing = _numbered(options.project, options.name)
        for folder in existing:
            recorded = read_fingerprint(folder)
            if recorded is None or fingerprint_differences(recorded, fingerprint):
                continue
            if not changed_files(recorded_file_bytes(folder), file_bytes):
                return folder
        if existing and (why := _difference(existing[0], fingerprint, file_bytes)):
            click.echo(f"{existing[0]}: holds another run ({why}); this one gets its own folder.", err=True)
    return next_run_folder(options.project, options.name, options.exist_ok)


def _difference(folder: Path, fingerprint: Fingerprint, file_bytes: dict[int, int]) -> str:
    """Why the run in a folder cannot be continued; empty where no run has begun."""
    recorded = read_fingerprint(folder)
    if recorded is None:
        return ""
    if differences := fingerprint_differences(recorded, fingerprint):
        return "; ".join(differences)
    return f"{changed_files(recorded_file_bytes(folder), file_bytes)} image files were replaced since"


def _numbered(project: Path, name: str) -> list[Path]:
    """The folders `name`, `name2`, `name3`, ... of a project, highest number first."""
    found = []
    for folder in project.iterdir() if project.is_dir() else ():
        number = folder.name.removeprefix(name)
        if folder.is_dir() and folder.name.startswith(name) and (not number or number.isdecimal()):
            found.append((int(number or 1), folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def _write_image_list(folder: Path, items: list[ImageItem]) -> None:
    """images.json: ids and names of a plain folder's images, in the form of the contest's image list."""
    images = [{"id": item.image_id, "file_name": item.file_name} for item in items]
    text = json.dumps({"images": images}, ensure_ascii=False, indent=1)
    write_atomically(folder / "images.json", (text + "\n").encode("utf-8", "surrogateescape"))


def _print_summary(report: InferReport) -> None:
    click.echo(
        f"Images: {report.covered} of {report.images} with a result"
        + (f" ({report.already} before this run)" if report.already else "")
        + f", {len(report.failed)} could not be read. Detections: {report.detections}."
    )
    caps = report.caps
    click.echo(
        f"Cut off: {caps.over_limit} candidates over the limit, {caps.at_max_det} images at --max-det, "
        f"{caps.without_area} boxes without area. Boxes clipped at the image's edge: {caps.clipped}."
    )
    work = report.work
    if work is None or not work.done:
        return
    times = ", ".join(f"{stage} {work.times.seconds[stage]:.2f}" for stage in STAGES)
    click.echo(
        f"Time: {work.seconds:.1f} s, {work.done / work.seconds:.1f} images/s. "
        f"Seconds of work by stage: {times}. Bottleneck: {work.times.bottleneck()}."
    )


def _failures(report: InferReport) -> str:
    """The message about images that could not be read."""
    examples = "".join(f"\n  {image.file_name}: {image.reason}" for image in report.failed[:EXAMPLES])
    more = f"\n  ... and {len(report.failed) - EXAMPLES} more" if len(report.failed) > EXAMPLES else ""
    return (
        f"{report.folder}: {len(report.failed)} of {report.images} images could not be read; the others are done. "
        f"Mend or replace them and run the same command again:{examples}{more}"
    )
