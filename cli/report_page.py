"""One HTML file that shows a run: pictures, accuracy, training, submission, time. It needs no network."""

from __future__ import annotations

import base64
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np

from parkdet.runtime.errors import UsageError
from parkdet.runtime.evaluation import Evaluation
from parkdet.runtime.geometry import ImageArray
from parkdet.submission.figures import SubmissionFigures

JPEG_QUALITY = 85
LONGEST_SIDE = 1600
"""Pixels to which larger pictures are reduced."""
NO_NUMBER = "-"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Picture:
    """A picture and the line under it."""

    caption: str
    image: ImageArray
    """(h, w, 3) uint8 BGR."""
    shows_truth: bool = False
    """Whether true boxes are drawn on it: the page then says what the dashes are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportPage:
    """What the page shows. A part that is empty or None leaves no trace on it."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    """(label, value): what was run, on what, with what."""
    pictures: Sequence[Picture] = ()
    class_names: Sequence[str] = ()
    """By class id: the legend of the pictures, with the numbers that `draw_detections` writes for some names."""
    evaluation: Evaluation | None = None
    results: Path | None = None
    """A results.csv with YOLOv5's columns."""
    stages: Sequence[tuple[str, float]] = ()
    """(name, seconds) in the order in which they ran."""
    submission: SubmissionFigures | None = None


def write_page(page: ReportPage, path: Path) -> None:
    """Write the page to one file, which is either the old one or the whole new one.

    Needs jinja2, and plotly where there is something to plot (the extra `report`). Raises UsageError where
    the folder or results.csv does not exist, DataError where results.csv is damaged.
    """
    if not path.resolve().parent.is_dir():
        raise UsageError(f"{path.parent}: no such folder; make it, or name another")
    # A name that is not text came from the file system; its bytes are shown as escapes.
    content = render_page(page).encode("utf-8", "backslashreplace")
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def render_page(page: ReportPage) -> str:
    """The HTML of the page."""
    import jinja2

    from parkdet.cli import report_charts
    from parkdet.cli.submission_charts import submission_charts

    epochs = report_charts.read_results(page.results) if page.results is not None else None
    charts: dict[str, list[report_charts.Chart]] = {
        "accuracy": report_charts.accuracy_charts(page.evaluation) if page.evaluation is not None else [],
        "training": report_charts.training_charts(epochs) if epochs is not None else [],
        "submission": submission_charts(page.submission) if page.submission is not None else [],
    }
    flat = [chart for group in charts.values() for chart in group]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        count=_count, decimal=_decimal, duration=_duration, percent=_percent, size=_size, figure=_figure
    )
    template = environment.from_string((files("parkdet.cli") / "templates" / "report.html.j2").read_text("utf-8"))
    return template.render(
        page=page,
        tiles=_tiles(page),
        pictures=[_InlinePicture.of(picture) for picture in page.pictures],
        legend=_legend(page.class_names) if page.pictures else [],
        epochs=epochs,
        charts=charts,
        figures={chart.key: chart.figure for chart in flat},
        plotly_js=report_charts.plotly_js() if flat else "",
        total_seconds=_total_seconds(page.stages),
        version=version("parkdet"),
    )


@dataclass(frozen=True, slots=True)
class _InlinePicture:
    caption: str
    source: str
    """A data URI."""
    width: int
    height: int

    @classmethod
    def of(cls, picture: Picture) -> _InlinePicture:
        import cv2

        image = picture.image
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"{picture.caption}: a picture is (h, w, 3) uint8, not {image.shape} {image.dtype}")
        ratio = LONGEST_SIDE / max(image.shape[:2])
        if ratio < 1:
            height, width = (max(1, round(side * ratio)) for side in image.shape[:2])
            image = np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        text = base64.b64encode(encoded.tobytes()).decode("ascii")
        return cls(picture.caption, f"data:image/jpeg;base64,{text}", image.shape[1], image.shape[0])


def _legend(class_names: Sequence[str]) -> list[tuple[str, str, str]]:
    """(colour, name, what the picture says instead of the name or nothing) of every class."""
    from parkdet.runtime.pictures import class_colour, class_label

    entries = []
    for class_id, name in enumerate(class_names):
        blue, green, red = class_colour(class_id)
        label = class_label(class_id, class_names)
        entries.append((f"#{red:02x}{green:02x}{blue:02x}", name, "" if label == name else label))
    return entries


def _tiles(page: ReportPage) -> list[tuple[str, str, str]]:
    """(label, figure, note): the few numbers to read first."""
    tiles = []
    if (measured := page.evaluation) is not None:
        tiles.append(("mAP@.5", _decimal(measured.map50), f"{_count(measured.truths)} true boxes"))
        tiles.append(("mAP@[.5:.95]", _decimal(measured.map), f"mAP@.75 {_decimal(measured.map75)}"))
    if (figures := page.submission) is not None:
        share = figures.size_bytes / figures.limit_bytes
        tiles.append(("Submission", _size(figures.size_bytes), f"{_percent(share)} of {_size(figures.limit_bytes)}"))
        tiles.append(("Detections in it", _count(figures.kept_count), f"of {_count(figures.total_count)}"))
    if page.stages:
        count = len(page.stages)
        total = _duration(_total_seconds(page.stages))
        tiles.append(("Time", total, f"{count} stages" if count > 1 else page.stages[0][0]))
    return tiles


def _total_seconds(stages: Sequence[tuple[str, float]]) -> float:
    for name, seconds in stages:
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"stage {name!r} took {seconds} seconds")
    return math.fsum(seconds for _, seconds in stages)


def _count(value: int) -> str:
    return f"{value:,}"


def _decimal(value: float | None, places: int = 3) -> str:
    return NO_NUMBER if value is None or not math.isfinite(value) else f"{value:.{places}f}"


def _figure(value: float | None) -> str:
    """Five significant digits."""
    return NO_NUMBER if value is None or not math.isfinite(value) else f"{value:.5g}"


def _percent(share: float) -> str:
    """Rounded down: what is just under a limit does not read as if it were on it."""
    if not math.isfinite(share):
        return NO_NUMBER
    return f"{math.floor(share * 1000) / 10:.1f} %"


def _size(value: int) -> str:
    """Bytes in the unit that suits them, powers of 1000, rounded down for the reason above."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= factor:
            return f"{value * 100 // factor / 100:.2f}".rstrip("0").rstrip(".") + f" {unit}"
    return f"{value} B"


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
