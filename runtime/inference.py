"""What `parkdet infer` does: artifact and images to a run folder, going on where an equal run stopped."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click

from parkdet.runtime.backends.base import Precision, refuse_unfit_views, resolve_artifact
from parkdet.runtime.backends.graph_cache import artifact_digest
from parkdet.runtime.contest import ContestData
from parkdet.runtime.deadline import DeadlinePlanner
from parkdet.runtime.errors import UsageError
from parkdet.runtime.image_names import Match
from parkdet.runtime.images import list_images
from parkdet.runtime.inference_report import InferReport
from parkdet.runtime.loading import ImageItem
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.nms import NmsSettings
from parkdet.runtime.pipeline import Pipeline, PipelineReport, PipelineSettings, Plan
from parkdet.runtime.plans import open_plans
from parkdet.runtime.run_folder import next_run_folder
from parkdet.runtime.shards import write_atomically
from parkdet.runtime.split import split_ids
from parkdet.runtime.store import (
    IMAGES_FILE,
    Fingerprint,
    RunStore,
    changed_files,
    fingerprint_differences,
    image_list_digest,
    read_fingerprint,
    recorded_file_bytes,
)
from parkdet.runtime.terminal import progress, quiet_decoders, stop_signals
from parkdet.runtime.views import TTA_VIEWS


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
    tta: bool = False
    """Insist on test-time augmentation. An artifact that was exported with it runs it in any case."""
    deadline: float | None = None
    """Seconds after which the last result must be there; cheaper plans are used when the best is too slow."""
    fallbacks: tuple[Path, ...] = ()
    """With a deadline, cheaper artifacts to step down to, best first; found beside the artifact when empty."""
    executor: str = "local"
    """`ray`: the shards are done by workers of a Ray cluster."""
    address: str | None = None
    """Of a running cluster."""
    workers: int | None = None
    """How many of the cluster's."""
    started: float | None = None
    """When the deadline began to run, on time.monotonic's clock; now when None."""


def run_inference(artifact: Path, options: InferOptions) -> InferReport:
    """Detect in all images asked for and store the predictions; go on with an equal run that is not finished.

    Prints the run folder first and last on stdout, progress on stderr. Images that could not be read, a stop by
    signal and a deadline that was not kept are told in the report: raise them with
    `InferReport.raise_unfinished`. UsageError, ArtifactError, DataError and InUseError as their classes say.
    """
    started = time.monotonic() if options.started is None else options.started
    _check_options(options)
    path = resolve_artifact(artifact)
    items = _images(options)
    with ExitStack() as stack:
        plans = open_plans(
            stack, path, options.imgsz, cheaper=options.deadline is not None, fallbacks=options.fallbacks,
            backend=options.backend, device=options.device, threads=options.threads, precision=options.precision,
        )  # fmt: skip
        best = plans[0]
        refuse_unfit_views(best.backend.spec, options.tta, path)
        if options.split == "val":
            items = _held_out(items, best.backend.spec)
        settings = PipelineSettings(
            nms=_nms_settings(options, best.backend.spec),
            imgsz=best.imgsz,
            batch_size=options.batch_size,
            keep_candidates=options.keep_candidates,
        )
        fingerprint = fingerprint_of(plans, settings, items)
        file_bytes = {item.image_id: item.file_bytes() for item in items}
        folder = _run_folder(options, fingerprint, file_bytes)
        with RunStore(folder, fingerprint, file_bytes, settings.keep_candidates) as store:
            # Not before the folder says whose it is: until then a kill leaves one that nobody goes on with.
            click.echo(f"Run folder: {folder}")
            click.echo(_what_runs(plans, settings.nms), err=True)
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
                    work = _work(options, plans, settings, items, store, stop, tell, started)
            report = InferReport(
                folder=folder, images=len(items), already=already, covered=len(store.covered),
                detections=store.detections, failed=tuple(store.failed), caps=store.caps,
                plans={plan.name: store.plans[plan.name] for plan in plans if plan.name in store.plans},
                deadline_s=options.deadline, work=work,
            )  # fmt: skip
            report.write()
    report.print()
    click.echo(f"Run folder: {folder}")
    return report


def _work(
    options: InferOptions, plans: Sequence[Plan], settings: PipelineSettings, items: list[ImageItem], store: RunStore,
    stop: threading.Event, tell: Callable[[int, int], None], started: float,
) -> PipelineReport:  # fmt: skip
    """Do what the store does not cover, here or on a cluster."""
    backend = plans[0].backend
    if options.executor == "ray":
        from parkdet.runtime.ray_executor import Job, run_on_ray

        job = Job(
            artifact=backend.path,
            settings=settings,
            backend=backend.name,
            device=options.device or "cpu",
            precision=backend.precision,
        )
        return run_on_ray(
            job, items, store, address=options.address, workers=options.workers, stop=stop, on_progress=tell
        )
    pipeline = Pipeline(backend, settings, plans)
    chooser = None if options.deadline is None else _planner(pipeline, started, options.deadline)
    return pipeline.run(items, store, stop=stop, on_progress=tell, chooser=chooser)


def _check_options(options: InferOptions) -> None:
    if (options.data is None) == (options.source is None):
        raise UsageError("give the images with --data or with --source, one of the two")
    if options.fresh and options.exist_ok:
        raise UsageError("--fresh begins a new folder and --exist-ok keeps to one: give one of the two")
    if options.fallbacks and options.deadline is None:
        raise UsageError("--fallback names what a run steps down to for its --deadline; give that, too")
    if options.executor != "ray" and (options.address or options.workers):
        raise UsageError("--address and --workers are a cluster's: give --executor ray, too")
    if options.executor == "ray" and options.deadline is not None:
        raise UsageError("--deadline chooses plans on one machine: give it or --executor ray, one of the two")
    if options.keep_candidates and options.deadline is not None:
        raise UsageError("--keep-candidates is for tuning one plan, --deadline may use several: give one of the two")


def _planner(pipeline: Pipeline, started: float, deadline: float) -> DeadlinePlanner:
    """The chooser of plans; tells when it steps down."""
    names = [plan.name for plan in pipeline.plans]

    def tell(plan: int) -> None:
        click.echo(f"deadline: going on with {names[plan]}", err=True)

    return DeadlinePlanner(
        [plan.cost for plan in pipeline.plans],
        deadline=started + deadline,
        lanes=pipeline.parallel * pipeline.settings.batch_size,
        reserve=min(1 + 0.01 * deadline, 30),
        on_step=tell,
    )


def _what_runs(plans: Sequence[Plan], nms: NmsSettings) -> str:
    backend = plans[0].backend
    views = f", {len(TTA_VIEWS)} test-time views" if backend.spec.tta else ""
    further = "; to keep the deadline: " + ", ".join(plan.name for plan in plans[1:]) if len(plans) > 1 else ""
    return (
        f"model: {backend.path.name} on {backend.name} in {backend.precision}, long side {plans[0].imgsz} px{views}, "
        f"conf {nms.conf:g}, IoU {nms.iou:g}, at most {nms.max_det} an image{further}"
    )


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


def fingerprint_of(plans: Sequence[Plan], settings: PipelineSettings, items: list[ImageItem]) -> Fingerprint:
    """What must be equal for two runs to be one: model, settings, image list."""
    nms, backend = settings.nms, plans[0].backend
    several = {}
    if len(plans) > 1:
        described = [f"{plan.name} {plan.backend.precision} {artifact_digest(plan.backend.path)}" for plan in plans]
        several["deadline_plans"] = hashlib.sha256("\n".join(described).encode()).hexdigest()
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
        **several,
        "image_list": image_list_digest((item.image_id, item.file_name) for item in items),
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
            problem=_why_missing(match, listed.folder),
        )
        for record, match in zip(listed.records, listed.matches, strict=True)
    ]


def _why_missing(found: Match, folder: Path) -> str:
    match found:
        case Match.OUTSIDE:
            return f"its name leads out of {folder}"
        case Match.AMBIGUOUS:
            return f"several files in {folder} could be meant"
        case _:
            return f"has no file in {folder}"


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
    # A byte of a name that is no UTF-8 becomes JSON's \udcXX.
    write_atomically(folder / IMAGES_FILE, (text + "\n").encode("utf-8", "backslashreplace"))
