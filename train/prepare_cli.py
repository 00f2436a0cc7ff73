"""`parkdet prepare`: check the data set, report what is wrong, split it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from parkdet.runtime.check_report import CheckReport
    from parkdet.runtime.split import Split

SIZES_SHOWN = 5


@click.command()
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the data set, in the contest's layout. It is only read.",
)
@click.option("--decode", is_flag=True, help="Decode every image; without it only both ends of each are read.")
@click.option("--seed", default=100, show_default=True, help="Seed of the draw of the validation images.")
@click.option(
    "--val-count",
    type=click.IntRange(min=0),
    help="Number of validation images.  [default: one in 8, at most 3000]",
)
@click.option(
    "--project",
    type=click.Path(path_type=Path),
    default=Path("runs/prepare"),
    show_default=True,
    help="Folder of the run folders.",
)
@click.option("--name", default="exp", show_default=True, help="Name of the run folder; exp2, exp3, ... follow.")
@click.option("--exist-ok", is_flag=True, help="Write into the run folder of that name, there or not.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def prepare(
    data: Path,
    decode: bool,
    seed: int,
    val_count: int | None,
    project: Path,
    name: str,
    exist_ok: bool,
    as_json: bool,
) -> int:
    """Check the data set, report what is wrong with counts and examples, and split it.

    Writes report.json and split.json (image ids of the training and validation images) into the run folder.
    Exits with 1 when a JSON file is unusable, or images are missing, unreadable, truncated or share an id.
    """
    from parkdet.runtime.contest import ContestData
    from parkdet.runtime.contest_check import check_data
    from parkdet.runtime.errors import EXIT_DONE, EXIT_FAILED, DataError
    from parkdet.runtime.run_folder import next_run_folder
    from parkdet.runtime.split import split_ids

    contest = ContestData(data)
    folder = next_run_folder(project, name, exist_ok)
    click.echo(f"run folder: {folder}", err=as_json)
    split: Split | None = None
    no_split = "the labels are unusable"
    try:
        with _Progress() as progress:
            report = check_data(contest, decode, progress.show)
        if report.train_ids:
            try:
                split = split_ids(report.train_ids, seed, val_count)
            except DataError as error:
                no_split = str(error)
    except BaseException:
        with suppress(OSError):  # a run without results leaves no folder, unless there is something in it
            folder.rmdir()
        raise

    document = report.to_json()
    document["split"] = split and {"train": len(split.train_ids), "val": len(split.val_ids), "seed": seed}
    _write_json(folder / "report.json", document)
    if split is not None:
        ids = {"seed": seed, "train_ids": list(split.train_ids), "val_ids": list(split.val_ids)}
        _write_json(folder / "split.json", ids)
    else:
        (folder / "split.json").unlink(missing_ok=True)  # an earlier run's, which --exist-ok left there
    if as_json:
        click.echo(_dumps(document))
    else:
        _show(report, split, no_split)
    click.echo(f"run folder: {folder}", err=as_json)
    return EXIT_FAILED if report.has_errors else EXIT_DONE


def _show(report: CheckReport, split: Split | None, no_split: str) -> None:
    console = _console()
    _show_parts(console, report)
    if report.classes:
        _show_classes(console, report)
    _show_findings(console, report)
    if split is not None:
        console.print(f"\nsplit: {len(split.train_ids):,} images train, {len(split.val_ids):,} validate")
    else:
        console.print(f"\nno split: {no_split}", style="bold red")


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    # Names come from the data: no markup, no emoji, no guessing at numbers and paths.
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        # A pipe has no width; a table wrapped at a guessed one could not be searched line by line.
        console.width = 1000
    return console


def _show_parts(console: Console, report: CheckReport) -> None:
    table = _table("part", ">images", ">usable", "formats", "sizes")
    for part, counts in report.parts.items():
        formats = ", ".join(f"{name} {number:,}" for name, number in counts.formats.items())
        sizes = [f"{w} x {h}: {number:,}" for (w, h), number in list(counts.sizes.items())[:SIZES_SHOWN]]
        more = len(counts.sizes) - len(sizes)
        sizes += [f"{more:,} more"] if more else []
        table.add_row(part, f"{counts.images:,}", f"{counts.usable:,}", formats, ", ".join(sizes))
    console.print()
    console.print(table)


def _show_classes(console: Console, report: CheckReport) -> None:
    table = _table(">id", "category", ">boxes", ">images")
    for each in report.classes:
        table.add_row(str(each.category_id), each.name, f"{each.boxes:,}", f"{each.images:,}")
    dropped = report.boxes_listed - report.boxes_usable
    left_out = f", {dropped:,} left out of {report.boxes_listed:,}" if dropped else ""
    console.print()
    console.print(table)
    console.print(f"{report.boxes_usable:,} boxes{left_out}")


def _show_findings(console: Console, report: CheckReport) -> None:
    from rich.text import Text

    styles = {"error": "bold red", "warning": "yellow", "note": "cyan"}
    console.print()
    if not report.findings:
        console.print("nothing found wrong", style="green")
    for finding in report.findings:
        severity = finding.severity.value
        line = Text(severity, styles[severity])
        console.print(line.append(f"  {finding.part}: {finding.text}: {finding.count:,}", "default"))
        for example in finding.examples:
            console.print(f"    {example}", style="dim")
        if (more := finding.count - len(finding.examples)) > 0:
            console.print(f"    and {more:,} more", style="dim")
    if not report.decoded:
        console.print("only the ends of the image files were read; --decode reads every pixel", style="dim")


def _table(*titles: str) -> Any:
    """A table of lines without frames; titles that begin with `>` head columns of numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title.removeprefix(">"), justify="right" if title.startswith(">") else "left")
    return table


class _Progress:
    """How far the check is, on stderr: a bar on a terminal, else one plain line every few seconds."""

    SECONDS_BETWEEN_LINES = 5.0

    def __init__(self) -> None:
        from time import monotonic

        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._clock = monotonic
        self._last = monotonic()
        console = _console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` images of one stage."""
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total)
            self._bar.update(self._tasks[stage], completed=done)
        elif self._clock() - self._last >= self.SECONDS_BETWEEN_LINES:
            self._last = self._clock()
            click.echo(f"{stage}: {done:,} of {total:,} images", err=True)


def _dumps(document: dict[str, Any]) -> str:
    import json

    return json.dumps(document, ensure_ascii=False, indent=2)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    """Write the whole file or nothing: a temporary name beside it, synced, renamed."""
    import os

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(_dumps(document) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
