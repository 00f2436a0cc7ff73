"""`parkdet demo`: the whole pipeline on parking lots that it draws itself, and a page that shows the result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from parkdet.runtime.contest import ContestData
    from parkdet.runtime.evaluation import Evaluation
    from parkdet.submission.cut import Fit

TRAIN_IMAGES = 640
TEST_IMAGES = 96
PICTURES = 12
LIMIT_BYTES = 300_000
"""Small enough that the cut really cuts."""


@dataclass(slots=True)
class _Stages:
    """How long each part of the demo took."""

    seconds: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        click.echo(f"\n== {name}", err=True)
        yield
        self.seconds.append((name, time.perf_counter() - started))


@click.command()
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the scenes.")
@click.option("--epochs", type=click.IntRange(min=1), help="Fewer, for a quick look.  [default: the recipe's]")
@click.option("--project", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option("--name", default="exp", show_default=True, help="Run folder in the project; exp2, exp3, ... follow.")
def demo(seed: int, epochs: int | None, project: Path, name: str) -> None:
    """Draw parking lots, train on them, export, infer, submit, and show the result in report.html.

    Seven to eight minutes on two cores. Everything stays in the run folder: the drawn data set, the training run,
    the exported graph, the predictions, the submission and the page.
    """
    from parkdet.runtime.contest import ContestData
    from parkdet.runtime.evaluation import evaluate, evaluation_table
    from parkdet.runtime.run_folder import next_run_folder
    from parkdet.train.cli import let_waiting_threads_sleep

    let_waiting_threads_sleep()
    folder = next_run_folder(project, name, exist_ok=False)
    click.echo(f"run folder: {folder}", err=True)
    stages = _Stages()
    with stages.timed("draw the data set"):
        data = _draw(folder / "data", seed)
    with stages.timed("train"):
        checkpoint = _train(folder, data, epochs)
    with stages.timed("export"):
        artifact = _export(checkpoint, data)
    with stages.timed("infer"):
        predictions = _infer(artifact, data, folder)
    with stages.timed("submit"):
        fit = _submit(predictions, data, folder / "submission.json")
    with stages.timed("score"):
        truth = data / "test_ground_truth.json"
        evaluation = evaluate(folder / "submission.json", truth)
        click.echo(evaluation_table(evaluation))
    with stages.timed("page"):
        page = _page(folder, ContestData(data), fit, evaluation, stages)
    total = sum(seconds for _, seconds in stages.seconds)
    times = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in stages.seconds)
    click.echo(f"{total:.0f} s: {times}", err=True)
    click.echo(f"mAP@.5 {evaluation.map50:.3f} of the submission on {evaluation.images} test scenes")
    click.echo(f"submission: {folder / 'submission.json'} ({fit.size_bytes:,} bytes)")
    click.echo(f"page: {page}")


def _draw(data: Path, seed: int) -> Path:
    from parkdet.runtime.terminal import progress
    from parkdet.train.data.scenes import write_demo_data

    with progress() as tell:
        write_demo_data(data, train=TRAIN_IMAGES, test=TEST_IMAGES, seed=seed, on_drawn=tell)
    return data


def _train(folder: Path, data: Path, epochs: int | None) -> Path:
    from parkdet.train.config import load_recipe
    from parkdet.train.run import RunSettings, start_run

    run = folder / "train"
    run.mkdir()
    recipe = load_recipe("demo", [f"train.epochs={epochs}"] if epochs else [])
    settings = RunSettings(data=str(data.resolve()), recipe=recipe)
    return start_run(run, settings, say=lambda line: click.echo(line, err=True))


def _export(checkpoint: Path, data: Path) -> Path:
    from parkdet.export.config import ExportOptions
    from parkdet.export.exporter import export_onnx

    options = ExportOptions(weights=checkpoint, calibration=data / "test" / "images")
    return export_onnx(options, say=lambda line: click.echo(line, err=True))


def _infer(artifact: Path, data: Path, folder: Path) -> Path:
    from parkdet.runtime.inference import InferOptions, run_inference

    report = run_inference(artifact, InferOptions(data=data, project=folder, name="detect"))
    report.raise_unfinished()
    return report.folder


def _submit(predictions: Path, data: Path, path: Path) -> Fit:
    from parkdet.runtime.contest import ContestData
    from parkdet.runtime.store import read_predictions
    from parkdet.submission.cut import fit_distinct
    from parkdet.submission.expected import Expected
    from parkdet.submission.write import write_submission

    expected = Expected.of(ContestData(data))
    fit = fit_distinct(read_predictions(predictions), LIMIT_BYTES, keys=expected.keys)
    write_submission(fit, path, lambda written: expected.check(written, LIMIT_BYTES, fit.format.bbox_decimals))
    click.echo(
        f"kept {fit.kept_count:,} of {fit.read_count:,} detections above {fit.threshold:.4f}: "
        f"{fit.size_bytes:,} of {LIMIT_BYTES:,} bytes",
        err=True,
    )
    return fit


def _page(folder: Path, data: ContestData, fit: Fit, evaluation: Evaluation, stages: _Stages) -> Path:
    import json

    import numpy as np

    from parkdet.cli.report_page import Picture, ReportPage, write_page
    from parkdet.runtime.detections import Detections
    from parkdet.runtime.geometry import xywh_to_xyxy
    from parkdet.runtime.images import read_image
    from parkdet.runtime.pictures import draw_detections
    from parkdet.submission.figures import SubmissionFigures

    labels = data.train_labels()
    class_of = {category: number for number, category in enumerate(labels.categories)}
    truth: dict[int, list[list[float]]] = {}
    for entry in json.loads((data.root / "test_ground_truth.json").read_text(encoding="utf-8"))["annotations"]:
        truth.setdefault(entry["image_id"], []).append(entry["bbox"])
    pictures = []
    for record in data.test_images()[:PICTURES]:
        assert record.path is not None
        rows = fit.kept.filter(fit.kept["image_id"] == record.image_id)
        detections = Detections.sorted(
            xywh_to_xyxy(rows.select("x", "y", "w", "h").to_numpy().reshape(-1, 4)),
            rows["score"].to_numpy(),
            [class_of[category] for category in rows["category_id"].to_list()],
        )
        boxes = xywh_to_xyxy(np.array(truth.get(record.image_id, []), np.float32).reshape(-1, 4))
        image = draw_detections(
            read_image(record.path), detections, labels.class_names, truth_xyxy=boxes.astype(np.float32)
        )
        pictures.append(Picture(caption=record.file_name, image=image, shows_truth=True))
    page = ReportPage(
        title="parkdet demo: drawn parking lots",
        facts=[
            ("training scenes", f"{len(labels.records)}"),
            ("test scenes", f"{len(data.test_images())}"),
            ("mAP@.5 of the submission", f"{evaluation.map50:.3f}"),
            ("submission", f"{fit.size_bytes:,} of {fit.limit_bytes:,} bytes"),
            ("folder", str(folder)),
        ],
        pictures=pictures,
        class_names=labels.class_names,
        evaluation=evaluation,
        results=folder / "train" / "results.csv",
        stages=stages.seconds,
        submission=SubmissionFigures.of_fit(fit, labels.categories),
    )
    path = folder / "report.html"
    write_page(page, path)
    return path
