"""The charts of the report, as plotly figures, and the reading of results.csv."""

from __future__ import annotations

import csv
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parkdet.runtime.errors import DataError, UsageError
from parkdet.runtime.evaluation import Evaluation

BLUE, ORANGE, GREEN, ROSE, GREY = "#3f83f8", "#e8912d", "#1ba784", "#d9577b", "#94a3b8"
"""Of middle lightness: the page's ground is light or dark, as the reader's system is set."""
PALE_BLUE = "rgba(63,131,248,0.32)"
_LINES = (BLUE, ORANGE, GREEN, ROSE, GREY)
_MARKED_EPOCHS = 25
"""Up to so many epochs each has its marker."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One plotly figure and what surrounds it."""

    key: str
    """The id of its element on the page."""
    caption: str
    summary: str
    """For readers who do not see the chart."""
    height: int
    """In CSS pixels."""
    figure: dict[str, Any]
    """`data` and `layout` in JSON's types."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """The columns of a results.csv, None where a cell is empty or not finite."""

    epochs: tuple[int, ...]
    columns: dict[str, tuple[float | None, ...]]
    """By name, in the order of the file, those that hold a number."""


def read_results(path: Path) -> Results | None:
    """The rows of a results.csv with YOLOv5's columns; None where there is no row yet.

    Raises UsageError where the file does not exist, DataError (with the line) where it is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; name the results.csv of a training run") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason}); name a results.csv") from error
    rows = [(number, cells) for number, cells in enumerate(csv.reader(lines), 1) if any(map(str.strip, cells))]
    if not rows:
        return None
    # YOLOv5 pads names and numbers with blanks.
    names = [cell.strip() for cell in rows[0][1]]
    if "epoch" not in names or len(set(names)) < len(names):
        raise DataError(f"{path}:1: the columns of a results.csv have different names and one is 'epoch'")
    table: list[list[float | None]] = []
    for number, cells in rows[1:]:
        if len(cells) != len(names):
            raise DataError(
                f"{path}:{number}: has {len(cells)} cells for {len(names)} columns; delete the line if it was cut off"
            )
        table.append([_cell(f"{path}:{number}: {name}", cell) for name, cell in zip(names, cells, strict=True)])
    if not table:
        return None
    columns = {name: tuple(values) for name, values in zip(names, zip(*table, strict=True), strict=True)}
    epochs = columns.pop("epoch")
    if any(epoch is None or epoch != int(epoch) for epoch in epochs):
        raise DataError(f"{path}: an epoch is not a whole number")
    return Results(
        epochs=tuple(int(epoch) for epoch in epochs if epoch is not None),
        columns={name: values for name, values in columns.items() if any(value is not None for value in values)},
    )


def _cell(place: str, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{place} is {text.strip()!r}, not a number; delete the line if it was cut off") from None
    return value if math.isfinite(value) else None


def training_charts(results: Results) -> list[Chart]:
    """Losses and metrics over epochs, those of them that the file holds."""
    losses = [name for name in results.columns if name.startswith(("train/", "val/"))]
    metrics = [name for name in results.columns if name.startswith("metrics/")]
    # mAP first: it is what the run is judged by.
    metrics.sort(key=lambda name: "mAP" not in name)
    last = results.epochs[-1]
    charts = []
    if losses:
        kinds = list(dict.fromkeys(name.partition("/")[2] for name in losses))
        traces = [
            _curve(
                results,
                name,
                f"{name.partition('/')[2].removesuffix('_loss')}, {name.partition('/')[0]}",
                _LINES[kinds.index(name.partition("/")[2]) % len(_LINES)],
                dashed=name.startswith("val/"),
            )
            for name in losses
        ]
        summary = f"Losses over epochs {results.epochs[0]} to {last}."
        chart = figure(traces, xaxis=_epoch_axis(), yaxis={"rangemode": "tozero", "title": axis_title("loss")})
        charts.append(Chart(key="chart-losses", caption="Losses", summary=summary, height=320, figure=chart))
    if metrics:
        traces = [
            _curve(results, name, _metric_name(name), _LINES[place % len(_LINES)], dashed="mAP" not in name)
            for place, name in enumerate(metrics)
        ]
        summary = f"Validation metrics over epochs {results.epochs[0]} to {last}."
        chart = figure(traces, xaxis=_epoch_axis(), yaxis={"range": [0, 1.02], "dtick": 0.2})
        charts.append(Chart(key="chart-metrics", caption="Validation", summary=summary, height=320, figure=chart))
    return charts


def accuracy_charts(evaluation: Evaluation) -> list[Chart]:
    """AP by class: AP@.5 wide and pale, AP@[.5:.95] narrow before it."""
    measured = [entry for entry in evaluation.per_class if math.isfinite(entry.ap)]
    if not measured:
        return []
    rows = list(range(len(measured)))
    bars = (("AP@.5", [entry.ap50 for entry in measured], PALE_BLUE, 0.72),
            ("AP@[.5:.95]", [entry.ap for entry in measured], BLUE, 0.36))  # fmt: skip
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "x": values,
            "y": rows,
            "width": width,
            "marker": {"color": colour, "line": {"width": 0}},
            "customdata": [plain_text(entry.name) for entry in measured],
            "hovertemplate": f"%{{customdata}}: {name} %{{x:.3f}}<extra></extra>",
        }
        for name, values, colour, width in bars
    ]
    chart = figure(
        traces,
        barmode="overlay",
        xaxis={"range": [0, 1.0], "dtick": 0.2},
        # Rows by number, not by name: two classes may have one name.
        yaxis=name_axis([entry.name for entry in measured]),
        hovermode="closest",
    )
    summary = "AP by class: " + ", ".join(f"{entry.name} {entry.ap50:.3f} at IoU .5" for entry in measured) + "."
    height = 60 + 31 * len(measured)  # about that of the table beside it
    return [Chart(key="chart-ap", caption="AP by class", summary=summary, height=height, figure=chart)]


def plotly_js() -> str:
    """The source of plotly.js, from the installed plotly."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def figure(traces: Sequence[dict[str, Any]], **layout: Any) -> dict[str, Any]:
    """A figure on the page's own ground, checked by plotly; the style sheet colours its text and lines."""
    import plotly.graph_objects as go

    base: dict[str, Any] = {
        "template": None,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "margin": {"l": 8, "r": 12, "t": 28, "b": 8},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 12}},
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "#1e293b", "bordercolor": "#1e293b", "font": {"color": "#f8fafc", "size": 12}},
        "dragmode": False,
    }
    axis = {"automargin": True, "gridwidth": 1, "zeroline": False, "fixedrange": True, "ticks": ""}
    axes = {name: axis | layout.pop(name, {}) for name in ("xaxis", "yaxis")}
    made = go.Figure(data=list(traces), layout=base | axes | layout)
    return dict(json.loads(made.to_json()))


def _curve(results: Results, column: str, name: str, colour: str, *, dashed: bool) -> dict[str, Any]:
    marked = len(results.epochs) <= _MARKED_EPOCHS
    return {
        "type": "scatter",
        "mode": "lines+markers" if marked else "lines",
        "name": plain_text(name),
        "x": list(results.epochs),
        "y": list(results.columns[column]),
        "connectgaps": True,  # epochs without validation have no value
        "line": {"color": colour, "width": 2, "dash": "dot" if dashed else "solid"},
        "marker": {"size": 5},
        "hovertemplate": "%{y:.4g}",
    }


def _metric_name(column: str) -> str:
    name = column.partition("/")[2]
    return {"mAP_0.5": "mAP@.5", "mAP_0.5:0.95": "mAP@[.5:.95]"}.get(name, name)


def _epoch_axis() -> dict[str, Any]:
    return {"title": axis_title("epoch"), "tickformat": "d", "showgrid": False}


def name_axis(names: Sequence[str], least_rows: int = 1) -> dict[str, Any]:
    """Rows from the top, named; room for at least so many, so that few bars are not thick ones."""
    return {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": [plain_text(name if len(name) <= 24 else f"{name[:23]}…") for name in names],
        "range": [max(len(names), least_rows) - 0.5, -0.5],
        "ticklabelstandoff": 6,
        "showgrid": False,
    }


def axis_title(text: str) -> dict[str, Any]:
    return {"text": text, "font": {"size": 12}, "standoff": 8}


def plain_text(text: str) -> str:
    """As plotly's text, in which tags and entities have a meaning."""
    return html.escape(text, quote=False)
