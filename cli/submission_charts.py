"""The charts of a submission: scores with the cut, bytes by class, the metric by the size of the file."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from parkdet.cli.report_charts import BLUE, GREEN, GREY, ORANGE, ROSE, Chart, axis_title, figure, name_axis, plain_text
from parkdet.submission.figures import SubmissionFigures


def submission_charts(figures: SubmissionFigures) -> list[Chart]:
    """Those for which there is something to show."""
    charts = []
    shares = sorted((share for share in figures.per_class if share.size_bytes), key=lambda share: -share.size_bytes)
    height = max(320, 60 + 26 * len(shares))
    if sum(figures.score_counts) > 0:
        charts.append(_histogram(figures, min(height, 480)))
    if shares:
        trace = {
            "type": "bar",
            "orientation": "h",
            "name": "bytes",
            "x": [share.size_bytes for share in shares],
            "y": list(range(len(shares))),
            "width": 0.6,
            "marker": {"color": GREEN, "line": {"width": 0}},
            "customdata": [plain_text(share.name) for share in shares],
            "hovertemplate": "%{customdata}: %{x:,} bytes<extra></extra>",
        }
        names = name_axis([share.name for share in shares], least_rows=8)
        axis = {"tickformat": "~s", "ticksuffix": "B", "nticks": 6}
        charts.append(
            Chart(
                key="chart-bytes",
                caption="Bytes by class",
                summary=f"{shares[0].name} takes the most bytes of the file: {shares[0].size_bytes:,}.",
                height=height,
                figure=figure([trace], xaxis=axis, yaxis=names, hovermode="closest", showlegend=False),
            )
        )
    if figures.points:
        charts.append(_by_size(figures))
    return charts


def _histogram(figures: SubmissionFigures, height: int) -> Chart:
    """What was read behind what is in the file."""
    edges = np.linspace(0, 1, len(figures.score_counts) + 1).tolist()
    threshold = figures.threshold
    shown = [
        ("cut", figures.score_counts, GREY),
        ("in the file", figures.kept_score_counts, BLUE),
    ]
    traces = [
        {
            "type": "bar",
            "name": name,
            "x": [(low + high) / 2 for low, high in pairwise(edges)],
            "y": list(counts),
            "width": [high - low for low, high in pairwise(edges)],
            "marker": {"color": colour, "line": {"width": 0}},
            "customdata": [
                f"{low:.3g} to {high:.3g}: {kept:,} of {read:,} in the file"
                for (low, high), kept, read in zip(
                    pairwise(edges), figures.kept_score_counts, figures.score_counts, strict=True
                )
            ],
            "hovertemplate": "score %{customdata}<extra></extra>",
        }
        for name, counts, colour in shown
    ]
    layout: dict[str, Any] = {
        "xaxis": {"range": [0, 1], "title": axis_title("score")},
        # Most detections have low scores: on a linear axis the others would not show.
        "yaxis": {
            "type": "log",
            "range": [math.log10(0.7), math.log10(max(figures.score_counts)) + 0.15],
            "dtick": 1,
            "tickformat": ",d",
            "title": axis_title("detections (log)"),
        },
        "barmode": "overlay",
        "bargap": 0.08,
        "hovermode": "closest",
        "showlegend": figures.cut_count > 0,
    }
    summary = f"Histogram of the scores of {sum(figures.score_counts):,} detections"
    if threshold is not None:
        # In the half of the chart that has room for the words.
        right = threshold > 0.5
        layout["shapes"] = [_line(threshold)]
        layout["annotations"] = [
            {
                "x": threshold,
                "y": 1,
                "yref": "paper",
                "text": f"cut at {threshold:.4f}",
                "showarrow": False,
                "xanchor": "right" if right else "left",
                "yanchor": "top",
                "xshift": -4 if right else 4,
            }
        ]
        summary += f"; those under {threshold:.4f} are cut"
    elif figures.cut_count:
        summary += f"; {figures.cut_count:,} are cut, by a threshold for each class"
    return Chart(
        key="chart-scores", caption="Scores", summary=f"{summary}.", height=height, figure=figure(traces, **layout)
    )


def _by_size(figures: SubmissionFigures) -> Chart:
    """The metric of the validation images by the size of the whole file."""
    sizes = [point.size_bytes for point in figures.points]
    lines: list[tuple[str, list[float | None], str]] = [
        ("one threshold", [point.single for point in figures.points], ORANGE),
        ("one a class", [point.per_class for point in figures.points], BLUE),
    ]
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": sizes,
            "y": values,
            "line": {"color": colour, "width": 2},
            "marker": {"size": 6},
            "hovertemplate": "%{y:.4f}",
        }
        for name, values, colour in lines
        if any(value is not None for value in values)
    ]
    chart = figure(
        traces,
        xaxis={"tickformat": "~s", "ticksuffix": "B", "title": axis_title("size of the file"), "showgrid": False},
        yaxis={"title": axis_title(plain_text(figures.metric))},
        shapes=[_line(figures.limit_bytes)],
        showlegend=True,
    )
    at_limit = min(figures.points, key=lambda point: abs(point.size_bytes - figures.limit_bytes))
    return Chart(
        key="chart-size",
        caption="The metric by the size of the file",
        summary=f"{figures.metric} of a file of {at_limit.size_bytes:,} bytes: {at_limit.single:.4f} by one threshold.",
        height=320,
        figure=chart,
    )


def _line(x: float) -> dict[str, Any]:
    line = {"color": ROSE, "width": 2}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}
