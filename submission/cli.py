"""`parkdet submit`: a run's predictions as the contest's file, or a check of any such file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from parkdet.runtime.errors import ArtifactError, GateError, UsageError
from parkdet.submission.size import DEFAULT_LIMIT, parse_size

if TYPE_CHECKING:
    import polars as pl

    from parkdet.submission.cut import Fit
    from parkdet.submission.expected import Expected

FILE_NAME = "submission.json"


@click.command()
@click.option("--predictions", type=click.Path(path_type=Path), help="Run folder that `parkdet infer` filled.")
@click.option("--check", "checked", type=click.Path(path_type=Path), help="Only check this file; any program's.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="The data set's folder.")
@click.option("--limit", default=DEFAULT_LIMIT, show_default=True, help="The file is smaller: 20MB, 20MiB, 20000000.")
@click.option("--output", type=click.Path(path_type=Path), help=f"The file to write.  [default: RUN/{FILE_NAME}]")
@click.option("--bbox-decimals", type=click.IntRange(0, 6), default=1, show_default=True, help="Of box pixels.")
@click.option("--score-decimals", type=click.IntRange(1, 9), default=4, show_default=True, help="Of scores.")
def submit(
    predictions: Path | None,
    checked: Path | None,
    data: Path,
    limit: str,
    output: Path | None,
    bbox_decimals: int,
    score_decimals: int,
) -> None:
    """Write the most confident detections that fit under the limit of bytes, or check a file.

    Exits with 3 where a judge would refuse the file; an older file is then left as it was.
    """
    from parkdet.runtime.contest import ContestData
    from parkdet.submission.expected import Expected

    if (predictions is None) == (checked is None):
        raise UsageError("give either --predictions RUN to write a file, or --check FILE to check one")
    if checked is not None and output is not None:
        raise UsageError("--check writes nothing; leave --output out")
    limit_bytes = parse_size(limit)
    if checked is not None and not checked.is_file():
        raise UsageError(f"{checked}: no such file")
    if predictions is not None and not predictions.is_dir():
        raise UsageError(f"{predictions}: no such folder; name the run folder of 'parkdet infer'")
    expected = Expected.of(ContestData(data))
    if checked is not None:
        _check(checked, expected, limit_bytes, bbox_decimals)
    elif predictions is not None:
        path = output or predictions / FILE_NAME
        _write(predictions, path, expected, limit_bytes, bbox_decimals, score_decimals)


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


def _write(
    run: Path, path: Path, expected: Expected, limit_bytes: int, bbox_decimals: int, score_decimals: int
) -> None:
    from parkdet.runtime.store import read_predictions
    from parkdet.submission.cut import fit_distinct
    from parkdet.submission.write import require_writable, write_submission

    require_writable(path)
    table = read_predictions(run)
    _require_complete(run, expected)
    fit = fit_distinct(
        table,
        limit_bytes,
        keys=expected.keys,
        bbox_decimals=bbox_decimals,
        score_decimals=score_decimals,
    )
    write_submission(fit, path, lambda written: expected.check(written, limit_bytes, bbox_decimals))
    click.echo("\n".join([*_summary(fit), "", *_by_category(table, fit, expected.category_names)]))
    if not fit.kept_count:
        reason = "the limit is too small for one" if fit.read_count else "the run has none; is it well trained?"
        click.echo(f"warning: {path} holds no detection: {reason}", err=True)
    click.echo(str(path))


def _require_complete(run: Path, expected: Expected) -> None:
    """ArtifactError while images are not done; those that could not be read are named and left without entries."""
    from parkdet.runtime.store import covered_images, failed_images

    names = expected.file_names
    covered = covered_images(run)
    reasons = {image.image_id: image.reason for image in failed_images(run)}
    missing = [image_id for image_id in names if image_id not in covered]
    undone = [image_id for image_id in missing if image_id not in reasons]
    if undone:
        examples = ", ".join(names[image_id] for image_id in undone[:3])
        raise ArtifactError(
            f"{run}: {len(undone):,} of {len(names):,} test images are not done yet, e.g. {examples}; "
            "run 'parkdet infer' again, it does only what is missing"
        )
    if missing:
        examples = ", ".join(f"{names[image_id]} ({reasons[image_id]})" for image_id in missing[:3])
        click.echo(
            f"warning: {len(missing):,} of {len(names):,} test images could not be read and have no entries, "
            f"e.g. {examples}",
            err=True,
        )


def _summary(fit: Fit) -> list[str]:
    threshold = "nothing was cut"
    if fit.cut_count:
        threshold = f"{fit.threshold:.7g} (all above it, and {fit.tied_kept_count:,} of {fit.tied_count:,} at it)"
    return [
        f"{'detections read':<20} {fit.read_count:,}",
        f"{'no area once rounded':<20} {fit.without_area_count:,}",
        f"{'repeated':<20} {fit.repeated_count:,}",
        f"{'cut':<20} {fit.cut_count:,}",
        f"{'kept':<20} {fit.kept_count:,}",
        f"{'threshold':<20} {threshold}",
        f"{'bytes':<20} {fit.size_bytes:,} of a limit of {fit.limit_bytes:,}",
    ]


def _by_category(table: pl.DataFrame, fit: Fit, names: dict[int, str]) -> list[str]:
    """One line a class; the name comes last, because its width on the screen is not known."""
    read = dict(table["category_id"].value_counts().iter_rows())
    kept = dict(fit.kept["category_id"].value_counts().iter_rows())
    lines = [f"{'category':>8} {'read':>11} {'kept':>11} {'left out':>11}  name"]
    for category_id, name in names.items():
        counts = read.get(category_id, 0), kept.get(category_id, 0)
        lines.append(f"{category_id:>8} {counts[0]:>11,} {counts[1]:>11,} {counts[0] - counts[1]:>11,}  {name}")
    return lines
