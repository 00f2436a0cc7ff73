"""The figures of a run, under the names that YOLOv5's users know: results.png, PR_curve.png, labels.jpg and so on.

Every function returns the picture's bytes; drawn with matplotlib's own renderer, without a display.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.evaluation import Curves, Evaluation
from parkdet.runtime.geometry import FloatArray
from parkdet.runtime.operating_point import smoothed
from parkdet.runtime.pictures import class_colour
from parkdet.train.lettering import Lettering

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULT_PANELS = (
    "train/box_loss",
    "train/obj_loss",
    "train/cls_loss",
    "metrics/precision",
    "metrics/recall",
    "metrics/mAP_0.5",
    "val/box_loss",
    "val/obj_loss",
    "val/cls_loss",
    "metrics/mAP_0.75",
    "metrics/mAP_0.5:0.95",
    "x/lr2",
)
"""Columns of results.csv, in the order in which they are drawn, six a row; x/lr2 is the rate of the weights."""
MANY_CLASSES = 20
"""Beyond it, curves of single classes are thin, grey and unnamed."""
MATRIX_NUMBERS = 30
"""Up to so many classes the confusion matrix has its numbers written in."""
OUTLINES = 1000
"""Boxes that labels.jpg draws over one another."""
_BLUE, _GREY, _INK = "#1f5fd0", "#9aa3ad", "#111827"


def results_figure(path: Path) -> bytes:
    """results.png of a results.csv: one panel a column, epochs to the right; empty cells are left out."""
    from matplotlib.ticker import MaxNLocator

    with path.open(newline="", encoding="utf-8") as file:
        rows = [{key.strip(): value for key, value in row.items() if key} for row in csv.DictReader(file)]
    figure = _figure(18, 6)
    for number, column in enumerate(RESULT_PANELS):
        axes = figure.add_subplot(2, len(RESULT_PANELS) // 2, number + 1)
        points = [(int(row["epoch"]), float(row[column])) for row in rows if (row.get(column) or "").strip()]
        epochs, values = (np.array([point[i] for point in points], np.float64) for i in (0, 1))
        axes.plot(epochs, values, color=_BLUE, linewidth=1.6, marker="o" if len(points) <= 60 else "", markersize=2.5)
        if column.startswith("metrics") and points:
            best = int(np.nanargmax(values)) if np.isfinite(values).any() else 0
            axes.set_title(f"{column}\nbest {values[best]:.3g} in epoch {epochs[best]:.0f}", fontsize=10)
        else:
            axes.set_title(column, fontsize=10)
        axes.grid(alpha=0.3)
        axes.margins(x=0.03)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if not points:
            axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color=_GREY)
    figure.supxlabel("epoch", fontsize=10)
    return _rendered(figure)


def curve_figures(evaluation: Evaluation, lettering: Lettering) -> dict[str, bytes]:
    """PR_curve.png, F1_curve.png, P_curve.png and R_curve.png; none where there was no truth."""
    curves = evaluation.curves
    if curves is None or np.isnan(curves.precision).all():
        return {}
    over = curves.by_confidence
    ap = [entry.ap50 for entry in evaluation.per_class]
    figures = {"PR_curve.png": _pr_figure(curves, ap, evaluation.map50, lettering)}
    shown = (("F1", "F1", over.f1), ("P", "Precision", over.precision), ("R", "Recall", over.recall))
    for short, name, values in shown:
        figures[f"{short}_curve.png"] = _confidence_figure(over.confidence, values, name, lettering)
    return figures


def _pr_figure(curves: Curves, ap: Sequence[float], mean_ap: float, lettering: Lettering) -> bytes:
    figure, axes = _one_panel("Recall", "Precision", "Precision and recall at IoU .5", lettering)
    named = [f"{name} {value:.3f}" for name, value in zip(lettering.names, ap, strict=True)]
    mean = np.nanmean(curves.precision, axis=0)
    _class_lines(axes, curves.recall, curves.precision, named)
    axes.plot(curves.recall, mean, color=_INK, linewidth=2.6, label=f"all classes {mean_ap:.3f} mAP@.5")
    return _with_legend(figure, axes, lettering)


def _confidence_figure(
    confidence: NDArray[np.float64], values: NDArray[np.float64], name: str, lettering: Lettering
) -> bytes:
    figure, axes = _one_panel("Confidence", name, f"{name} over confidence at IoU .5", lettering)
    mean = smoothed(np.nanmean(values, axis=0))
    at = int(mean.argmax())
    _class_lines(axes, confidence, values, lettering.names)
    label = f"all classes {mean[at]:.2f} at {confidence[at]:.3f}"
    axes.plot(confidence, mean, color=_INK, linewidth=2.6, label=label)
    return _with_legend(figure, axes, lettering)


def _class_lines(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], names: Sequence[str]) -> None:
    few = len(names) <= MANY_CLASSES
    for number, (name, line) in enumerate(zip(names, y, strict=True)):
        if not np.isnan(line).all():
            colour = _rgb(number) if few else _GREY
            axes.plot(x, line, color=colour, linewidth=1.4 if few else 0.8, label=name if few else None)


def confusion_figure(counts: NDArray[np.int64], lettering: Lettering) -> bytes:
    """confusion_matrix.png of counts (nc + 1, nc + 1): columns are true classes, each summing to 1."""
    total = counts.sum(axis=0, keepdims=True)
    share = np.where(total > 0, counts / np.maximum(total, 1), math.nan)
    names = [*lettering.names, "background"]
    few = len(names) - 1 <= MATRIX_NUMBERS
    side = min(max(6.0, 0.62 * len(names) + 3), 24.0) if few else 14.0
    figure = _figure(side + 1, side)
    axes = figure.add_subplot()
    picture = axes.imshow(np.ma.masked_invalid(share), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03)
    for row, column in np.argwhere(counts > 0).tolist() if few else ():
        dark = share[row, column] > 0.55
        text = f"{share[row, column]:.2f}\n{counts[row, column]}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    if few:
        axes.set_xticks(range(len(names)), names, rotation=90, family=list(lettering.families))
        axes.set_yticks(range(len(names)), names, family=list(lettering.families))
    axes.set_xlabel("True")
    axes.set_ylabel("Predicted")
    axes.set_title("Confusion matrix: share of the true class, and boxes")
    return _rendered(figure)


def labels_figure(class_ids: NDArray[np.int32], cxcywh: FloatArray, lettering: Lettering) -> bytes:
    """labels.jpg: boxes a class, boxes laid over one another, where their centres are, how large they are.

    `cxcywh` (n, 4): shares of the image's sides.
    """
    figure = _figure(11, 10)
    counts = np.bincount(class_ids, minlength=len(lettering.names))
    axes = figure.add_subplot(2, 2, 1)
    few = len(counts) <= MATRIX_NUMBERS
    bars = axes.bar(range(len(counts)), counts, color=[_rgb(number) for number in range(len(counts))])
    if few:
        axes.bar_label(bars, fontsize=8)
        axes.set_xticks(range(len(counts)), lettering.names, rotation=90, family=list(lettering.families))
    axes.set_title(f"{len(class_ids)} boxes")
    axes.set_ylabel("boxes")
    axes = figure.add_subplot(2, 2, 2)
    # A share of the boxes, evenly chosen: all would take longer and show no more.
    chosen = np.linspace(0, len(cxcywh) - 1, min(OUTLINES, len(cxcywh))).astype(int)
    _draw_outlines(axes, cxcywh[chosen], class_ids[chosen])
    for place, (first, names) in enumerate(((0, ("x", "y")), (2, ("width", "height"))), 3):
        axes = figure.add_subplot(2, 2, place)
        _density(axes, cxcywh[:, first], cxcywh[:, first + 1])
        axes.set(xlabel=names[0], ylabel=names[1], xlim=(0, 1), ylim=(0, 1))
        axes.set_title("centres" if first == 0 else "sizes")
        if first == 0:
            axes.invert_yaxis()
    return _rendered(figure, "jpg")


def correlogram_figure(cxcywh: FloatArray) -> bytes:
    """labels_correlogram.jpg: how x, y, width and height of the boxes go together."""
    figure = _figure(9, 9)
    names = ("x", "y", "width", "height")
    for row in range(4):
        for column in range(row + 1):
            axes = figure.add_subplot(4, 4, row * 4 + column + 1)
            if row == column:
                axes.hist(cxcywh[:, row], bins=50, range=(0, 1), color=_BLUE)
            else:
                _density(axes, cxcywh[:, column], cxcywh[:, row])
                axes.set_ylim(0, 1)
            axes.set_xlim(0, 1)
            axes.tick_params(labelsize=7)
            if row == 3:
                axes.set_xlabel(names[column])
            if column == 0:
                axes.set_ylabel(names[row] if row else "boxes")
    return _rendered(figure, "jpg")


def _draw_outlines(axes: Axes, cxcywh: FloatArray, class_ids: NDArray[np.int32]) -> None:
    from matplotlib.collections import LineCollection

    half_w, half_h = cxcywh[:, 2] / 2, cxcywh[:, 3] / 2
    corners = [(-half_w, -half_h), (half_w, -half_h), (half_w, half_h), (-half_w, half_h), (-half_w, -half_h)]
    lines = np.stack([np.stack(corner, axis=1) for corner in corners], axis=1) + 0.5
    axes.add_collection(
        LineCollection(list(lines), colors=[_rgb(int(number)) for number in class_ids], linewidths=0.6, alpha=0.6)
    )
    axes.set(xlim=(0, 1), ylim=(1, 0), aspect="equal", xticks=[], yticks=[])
    axes.set_title("shapes, about one centre")


def _density(axes: Axes, x: FloatArray, y: FloatArray) -> None:
    if len(x):
        counts, x_edges, y_edges = np.histogram2d(x, y, bins=50, range=[[0, 1], [0, 1]])
        # The root shows rare places beside frequent ones.
        axes.pcolormesh(x_edges, y_edges, np.sqrt(counts).T, cmap="Blues", vmin=0, rasterized=True)


def _rgb(class_id: int) -> tuple[float, float, float]:
    blue, green, red = class_colour(class_id)
    return red / 255, green / 255, blue / 255


def _figure(width: float, height: float) -> Figure:
    """A figure of so many inches, without pyplot: no state that outlives it, no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _one_panel(x: str, y: str, title: str, lettering: Lettering) -> tuple[Figure, Axes]:
    few = len(lettering.names) <= MANY_CLASSES
    figure = _figure(9 if few else 7.5, 6)
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y, xlim=(0, 1), ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _with_legend(figure: Figure, axes: Axes, lettering: Lettering) -> bytes:
    # Beside the curves: over them it would hide the corner that matters.
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, prop={"family": list(lettering.families)})
    return _rendered(figure)


def _rendered(figure: Figure, kind: str = "png") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    options: dict[str, Any] = {"pil_kwargs": {"quality": 92}} if kind == "jpg" else {}
    figure.savefig(buffer, format=kind, dpi=150, **options)
    return buffer.getvalue()
