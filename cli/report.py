"""`parkdet report`: a run folder as a page to look at, and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parkdet.runtime.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from parkdet.cli.report_page import Picture, ReportPage
    from parkdet.runtime.contest import ContestData
    from parkdet.submission.figures import SubmissionFigures
    from parkdet.submission.runs import PredictionRun

PAGE_NAME = "report.html"
PICTURES = 12


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="The data set: class names, pictures.")
@click.option(
    "--truth",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="COCO file of the run's images: their accuracy.  [default: Train.json of --data, where it has them]",
)
@click.option(
    "--submission",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The file that `parkdet submit` wrote of it.  [default: RUN/submission.json]",
)
@click.option("--metric", default="map50=0.1,map75=0.9", show_default=True, help="Of accuracy against bytes.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help=f"[default: RUN/{PAGE_NAME}]")
def report(
    run: Path, data: Path | None, truth: Path | None, submission: Path | None, metric: str, output: Path | None
) -> None:
    """Show a run of `parkdet train` or `parkdet infer` in one HTML file that needs no network.

    Of a training: losses and metrics. Of predictions: detections by score and by class with the cut, where
    there is truth their accuracy, also against the size of the file; with --data pictures too. The submission's
    figures are printed as tables as well.
    """
    from parkdet.cli.report_page import ReportPage, write_page
    from parkdet.submission.tune import parse_metric

    if not run.is_dir():
        raise UsageError(f"{run}: no such folder; name a run folder of 'parkdet train' or 'parkdet infer'")
    weights = parse_metric(metric)
    asked = _Asked(run, data, truth, submission, metric, weights)
    page = ReportPage(title=f"parkdet: {run.resolve().name}")
    has_results, has_predictions = (run / "results.csv").is_file(), (run / "predictions").is_dir()
    if not has_results and not has_predictions:
        raise UsageError(
            f"{run}: holds neither results.csv nor predictions; name the run folder that 'parkdet train' or "
            "'parkdet infer' printed"
        )
    if has_results:
        page = replace(page, results=run / "results.csv")
    if has_predictions:
        page = _with_predictions(page, asked)
    path = output or run / PAGE_NAME
    write_page(page, path)
    click.echo(str(path))


@dataclass(frozen=True, slots=True)
class _Asked:
    run: Path
    data: Path | None
    truth: Path | None
    submission: Path | None
    metric: str
    weights: Mapping[str, float]


def _with_predictions(page: ReportPage, asked: _Asked) -> ReportPage:
    from parkdet.runtime.contest import ContestData
    from parkdet.runtime.evaluation import evaluate
    from parkdet.submission.cli import FILE_NAME
    from parkdet.submission.expected import category_names
    from parkdet.submission.runs import PredictionRun
    from parkdet.submission.summary import summary

    run = PredictionRun.open(asked.run)
    submission = asked.submission or asked.run / FILE_NAME
    figures = _recorded(submission, is_asked=asked.submission is not None)
    is_submitted = figures is not None
    root = asked.data or _data_of(figures)
    data = ContestData(root) if root is not None else None
    names = category_names(data) if data is not None else {}
    truth = _truth(asked, run, data)
    facts = [(key.replace("_", " "), _short(value)) for key, value in run.fingerprint.items()]
    if figures is None:
        figures = _as_if_submitted(run, names)
        facts.append(("submission", f"none yet; the figures are those of a limit of {figures.limit_bytes:,} bytes"))
    evaluation = None
    if truth is not None:
        max_det = run.nms.max_det if run.nms is not None else 100
        evaluation = evaluate(submission if is_submitted else run.table(), truth, max_det=max_det)
        facts.append(("accuracy", "of the submission" if is_submitted else "of all predictions"))
        if not figures.points:
            figures = replace(figures, metric=asked.metric, points=_points(run, truth, asked, figures, max_det))
    click.echo(summary(figures))
    click.echo()
    return replace(
        page,
        facts=facts,
        submission=figures,
        evaluation=evaluation,
        pictures=_pictures(run, data, names, truth) if data is not None else (),
        class_names=tuple(names.values()),
    )


def _recorded(submission: Path, is_asked: bool) -> SubmissionFigures | None:
    """What `submit` noted beside its file; None where no file was written yet.

    UsageError where the user named a file that is not there.
    """
    from parkdet.submission.figures import SubmissionFigures, figures_path

    noted = figures_path(submission)
    if not submission.is_file() or not noted.is_file():
        if is_asked:
            missing = noted if submission.is_file() else submission
            raise UsageError(f"{missing}: no such file; 'parkdet submit' writes it")
        return None
    figures = SubmissionFigures.read(noted)
    if figures.size_bytes != submission.stat().st_size:
        raise ArtifactError(
            f"{noted}: is of a file of {figures.size_bytes:,} bytes, {submission} has "
            f"{submission.stat().st_size:,}; run 'parkdet submit' again"
        )
    return figures


def _data_of(figures: SubmissionFigures | None) -> Path | None:
    """The data set that was submitted for, where it is still there."""
    noted = figures.sources.get("data") if figures is not None else None
    return Path(noted) if isinstance(noted, str) and Path(noted).is_dir() else None


def _as_if_submitted(run: PredictionRun, names: Mapping[int, str]) -> SubmissionFigures:
    from parkdet.submission.cut import fit_batches
    from parkdet.submission.figures import SubmissionFigures
    from parkdet.submission.lines import SubmissionFormat
    from parkdet.submission.size import DEFAULT_LIMIT, parse_size

    return SubmissionFigures.of_fit(fit_batches(run.batches, parse_size(DEFAULT_LIMIT), SubmissionFormat()), names)


def _truth(asked: _Asked, run: PredictionRun, data: ContestData | None) -> dict[str, Any] | None:
    """COCO truth of the run's images, where there is any."""
    from parkdet.submission.truth import part_of, truth_of

    if asked.truth is not None:
        try:
            document = json.loads(asked.truth.read_bytes())
        except FileNotFoundError:
            raise UsageError(f"{asked.truth}: no such file; name a COCO file with --truth") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{asked.truth}: is not JSON ({error}); name a COCO file with --truth") from error
        if not isinstance(document, dict):
            raise UsageError(f"{asked.truth}: is not a COCO truth; it must hold 'images' and 'annotations'")
        return document
    if data is None or not run.covered or part_of(run, data) != "train":
        return None
    return truth_of(data, run.covered, str(run.folder))


def _points(
    run: PredictionRun, truth: dict[str, Any], asked: _Asked, figures: SubmissionFigures, max_det: int
) -> list[Any]:
    from parkdet.submission.lines import SubmissionFormat
    from parkdet.submission.tune import Validation, metric_by_size

    validation = Validation(
        table=run.table(), truth=truth, weights=asked.weights, max_det=max_det, form=SubmissionFormat()
    )
    images = len(validation.image_ids)
    return list(metric_by_size(validation, figures.limit_bytes, images))


def _pictures(
    run: PredictionRun, data: ContestData, names: Mapping[int, str], truth: dict[str, Any] | None
) -> list[Picture]:
    """Some of the run's images with what was detected on them."""
    import numpy as np
    import polars as pl

    from parkdet.cli.report_page import Picture
    from parkdet.runtime.detections import Detections
    from parkdet.runtime.geometry import xywh_to_xyxy
    from parkdet.runtime.images import read_image
    from parkdet.runtime.pictures import draw_detections
    from parkdet.submission.truth import part_of, records_of

    part = part_of(run, data)
    records = records_of(part, data) if part is not None else ()
    class_of = {category_id: number for number, category_id in enumerate(names)}
    shown = [record for record in records if record.image_id in run.covered and record.path is not None][:PICTURES]
    ids = pl.Series([record.image_id for record in shown], dtype=pl.Int64)
    rows = pl.concat([batch.filter(pl.col("image_id").is_in(ids.implode())) for batch in run.batches()])
    boxes: dict[int, list[list[float]]] = {}
    for entry in truth["annotations"] if truth is not None else ():
        boxes.setdefault(entry["image_id"], []).append(entry["bbox"])
    pictures = []
    for record in shown:
        assert record.path is not None
        mine = rows.filter((pl.col("image_id") == record.image_id) & pl.col("category_id").is_in(list(class_of)))
        detections = Detections.sorted(
            xywh_to_xyxy(mine.select("x", "y", "w", "h").to_numpy().reshape(-1, 4)),
            mine["score"].to_numpy(),
            [class_of[category_id] for category_id in mine["category_id"].to_list()],
        )
        known = xywh_to_xyxy(np.array(boxes.get(record.image_id, []), np.float32).reshape(-1, 4)).astype(np.float32)
        image = draw_detections(
            read_image(record.path), detections, tuple(names.values()), truth_xyxy=known if truth is not None else None
        )
        pictures.append(Picture(caption=record.file_name, image=image, shows_truth=truth is not None))
    return pictures


def _short(value: object) -> str:
    """A checksum's first digits; anything else as it is."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
