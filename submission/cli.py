"""`parkdet submit`: runs' predictions as the contest's file, or a check of any such file, or a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from parkdet.runtime.errors import GateError, ParkdetError, UsageError
from parkdet.submission.size import DEFAULT_LIMIT, parse_size

if TYPE_CHECKING:
    from parkdet.runtime.contest import ContestData
    from parkdet.submission.expected import Expected
    from parkdet.submission.merge import MergeSettings

FILE_NAME = "submission.json"
DEFAULT_METRIC = "map50=0.1,map75=0.9"


@click.command()
@click.option(
    "--predictions",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Run folder that `parkdet infer` filled. Several are merged.",
)
@click.option("--check", "checked", type=click.Path(path_type=Path), metavar="FILE", help="Only check this file.")
@click.option(
    "--diff", nargs=2, type=click.Path(path_type=Path), metavar="A B", help="Only say how two files differ (exit 3)."
)
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="The data set's folder.")
@click.option("--limit", default=DEFAULT_LIMIT, show_default=True, help="The file is smaller: 20MB, 20MiB, 20000000.")
@click.option("--output", type=click.Path(path_type=Path), help=f"The file to write.  [default: RUN/{FILE_NAME}]")
@click.option("--bbox-decimals", type=click.IntRange(0, 6), default=1, show_default=True, help="Of box pixels.")
@click.option("--score-decimals", type=click.IntRange(1, 9), default=4, show_default=True, help="Of scores.")
@click.option(
    "--tune",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Run of the same model with `infer --split val`: thresholds by class, where they win. One for each run.",
)
@click.option("--metric", default=DEFAULT_METRIC, show_default=True, help="What --tune makes high.")
@click.option(
    "--merge", "method", type=click.Choice(["wbf", "nms"]), default="wbf", show_default=True, help="Of several runs."
)
@click.option(
    "--merge-iou",
    type=click.FloatRange(0, 1),
    default=0.55,
    show_default=True,
    help="IoU above which boxes of several runs are one.",
)
@click.option("--merge-weights", metavar="W,W", help="One a run, in their order.  [default: equal]")
def submit(
    predictions: tuple[Path, ...],
    checked: Path | None,
    diff: tuple[Path, Path] | None,
    data: Path | None,
    limit: str,
    output: Path | None,
    bbox_decimals: int,
    score_decimals: int,
    tune: tuple[Path, ...],
    metric: str,
    method: Literal["wbf", "nms"],
    merge_iou: float,
    merge_weights: str | None,
) -> None:
    """Write the detections that are worth most and fit under the limit of bytes, or check or compare files.

    Exits with 3 where a judge would refuse the file (an older file is then left as it was), and where
    compared files differ.
    """
    from parkdet.runtime.contest import ContestData
    from parkdet.submission.check import require_file
    from parkdet.submission.expected import Expected
    from parkdet.submission.merge import MergeSettings
    from parkdet.submission.tune import parse_metric

    if [bool(predictions), checked is not None, diff is not None].count(True) != 1:
        raise UsageError("give either --predictions RUN to write a file, --check FILE to check one, or --diff A B")
    if not predictions and output is not None:
        raise UsageError(f"--{'diff' if diff else 'check'} writes nothing; leave --output out")
    if not predictions and tune:
        raise UsageError("--tune goes with --predictions; leave it out")
    if diff is not None:
        _diff(*diff)
        return
    if data is None:
        raise UsageError("name the data set's folder with --data")
    limit_bytes = parse_size(limit)
    parse_metric(metric)
    merge = MergeSettings(method=method, iou=merge_iou, weights=_numbers(merge_weights))
    if checked is not None:
        require_file(checked)
    for run in (*predictions, *tune):
        if not run.is_dir():
            raise UsageError(f"{run}: no such folder; name the run folder of 'parkdet infer'")
    contest = ContestData(data)
    expected = Expected.of(contest)
    if checked is not None:
        _check(checked, expected, limit_bytes, bbox_decimals)
        return
    asked = _Asked(
        predictions, tune, output or predictions[0] / FILE_NAME, limit_bytes, bbox_decimals, score_decimals,
        metric, merge,
    )  # fmt: skip
    _write(asked, contest, expected)


@dataclass(frozen=True, slots=True)
class _Asked:
    predictions: tuple[Path, ...]
    tune: tuple[Path, ...]
    path: Path
    limit_bytes: int
    bbox_decimals: int
    score_decimals: int
    metric: str
    merge: MergeSettings


def _numbers(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(f"--merge-weights {text!r}: write one number a run, such as 2,1") from None


def _check(path: Path, expected: Expected, limit_bytes: int, bbox_decimals: int) -> None:
    report = expected.check(path, limit_bytes, bbox_decimals)
    click.echo(f"{path}: {report.entry_count:,} entries, {report.size_bytes:,} bytes, limit {limit_bytes:,} bytes")
    if report.findings:
        click.echo(str(report))
        kinds = len(report.findings)
        raise GateError(
            f"{path}: a judge would refuse it ({kinds} kind{'s' * (kinds > 1)} of fault); "
            "mend what wrote it, or write it with 'parkdet submit --predictions'"
        )
    click.echo("nothing to refuse")


def _diff(first: Path, second: Path) -> None:
    from parkdet.submission.diff import diff_submissions

    report = diff_submissions(first, second)
    click.echo(str(report))
    if not report.is_same:
        raise GateError(f"{first} and {second} differ")


def _write(asked: _Asked, contest: ContestData, expected: Expected) -> None:
    from parkdet.submission.compose import Composition, compose
    from parkdet.submission.figures import SubmissionFigures, figures_path
    from parkdet.submission.lines import SubmissionFormat
    from parkdet.submission.runs import PredictionRun
    from parkdet.submission.summary import summary
    from parkdet.submission.truth import require_test_run
    from parkdet.submission.tune import parse_metric
    from parkdet.submission.write import require_writable, write_submission

    require_writable(asked.path)
    form = SubmissionFormat(keys=expected.keys, bbox_decimals=asked.bbox_decimals, score_decimals=asked.score_decimals)
    runs = [PredictionRun.open(run) for run in asked.predictions]
    for run in runs:
        require_test_run(run, expected.file_names, contest)
        _warn_of_unread(run.require_complete(expected.file_names), len(expected.file_names))
    composition = Composition(
        runs=runs,
        tune_runs=[PredictionRun.open(run) for run in asked.tune],
        merge=asked.merge,
        weights=parse_metric(asked.metric),
        form=form,
        limit_bytes=asked.limit_bytes,
        image_count=len(expected.file_names),
    )
    composed = compose(composition, contest, lambda line: click.echo(line, err=True))
    fit = composed.fit
    write_submission(fit, asked.path, lambda written: expected.check(written, asked.limit_bytes, asked.bbox_decimals))
    figures = SubmissionFigures.of(
        composed,
        expected.category_names,
        asked.metric,
        {
            "submission": str(asked.path.resolve()),
            "predictions": [str(run.resolve()) for run in asked.predictions],
            "data": str(contest.root.resolve()),
        },
    )
    click.echo(summary(figures))
    try:
        figures.write(figures_path(asked.path))
    except ParkdetError as error:
        click.echo(f"warning: the submission is written, its figures for 'parkdet report' are not: {error}", err=True)
    if not fit.kept_count:
        reason = "the limit is too small for one" if fit.read_count else "the run has none; is it well trained?"
        click.echo(f"warning: {asked.path} holds no detection: {reason}", err=True)
    click.echo(str(asked.path))


def _warn_of_unread(unread: list[str], of_images: int) -> None:
    if unread:
        click.echo(
            f"warning: {len(unread):,} of {of_images:,} test images could not be read and have no entries, "
            f"e.g. {', '.join(unread[:3])}",
            err=True,
        )
