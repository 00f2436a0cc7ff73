"""What `parkdet submit` prints: the cut, the classes, the scores, and what tuning was worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from parkdet.submission.compose import Composed
from parkdet.submission.cut import HISTOGRAM_BINS, Fit
from parkdet.submission.nms_search import NmsTuning
from parkdet.submission.tune import Tuning

_TABLE_BINS = 10
"""Rows of the printed histogram."""
_BAR = 40
"""Characters of its longest bar."""


def summary(composed: Composed, names: Mapping[int, str]) -> str:
    """All of it; `names` by category id."""
    fit = composed.fit
    parts = [_cut(fit), _by_category(fit, names), _by_score(fit)]
    if composed.nms is not None:
        parts.append(_nms(composed.nms, applied=composed.nms_used is not None))
    if composed.tuning is not None:
        parts.append(_tuning(composed.tuning))
    return "\n\n".join("\n".join(part) for part in parts)


def _cut(fit: Fit) -> Iterator[str]:
    threshold = "nothing was cut"
    if fit.cut_count and fit.class_thresholds:
        threshold = "one a class, see below"
    elif fit.cut_count:
        threshold = f"{fit.threshold:.7g} (all above it, and {fit.tied_kept_count:,} of {fit.tied_count:,} at it)"
    yield f"{'detections read':<20} {fit.read_count:,}"
    yield f"{'no area once rounded':<20} {fit.without_area_count:,}"
    yield f"{'repeated':<20} {fit.repeated_count:,}"
    yield f"{'cut':<20} {fit.cut_count:,}"
    yield f"{'kept':<20} {fit.kept_count:,}"
    yield f"{'threshold':<20} {threshold}"
    yield f"{'bytes':<20} {fit.size_bytes:,} of a limit of {fit.limit_bytes:,}"


def _by_category(fit: Fit, names: Mapping[int, str]) -> Iterator[str]:
    """One line a class; the name comes last, because its width on the screen is not known."""
    kept = dict(fit.kept["category_id"].value_counts().iter_rows())
    category = fit.kept["category_id"].to_numpy()
    line_bytes = fit.format.line_bytes(fit.kept) + 1
    yield f"{'category':>8} {'read':>11} {'kept':>11} {'left out':>11} {'bytes':>12} {'threshold':>10}  name"
    for category_id, name in names.items():
        read_count, kept_count = fit.read_by_category.get(category_id, 0), kept.get(category_id, 0)
        size = int(line_bytes[category == category_id].sum())
        threshold = fit.class_thresholds.get(category_id, fit.threshold)
        yield (
            f"{category_id:>8} {read_count:>11,} {kept_count:>11,} {read_count - kept_count:>11,} {size:>12,} "
            f"{threshold:>10.4g}  {name}"
        )


def _by_score(fit: Fit) -> Iterator[str]:
    """What was read and kept, by score; bars on a logarithmic scale, for most scores are low."""
    read = fit.score_counts.reshape(_TABLE_BINS, -1).sum(axis=1)
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    kept = np.histogram(fit.kept["score"].to_numpy(), bins=edges)[0].reshape(_TABLE_BINS, -1).sum(axis=1)
    most = np.log1p(max(int(read.max()), 1))
    yield f"{'score':>11} {'read':>11} {'kept':>11}"
    for number in range(_TABLE_BINS):
        bars = [round(_BAR * float(np.log1p(count)) / most) for count in (kept[number], read[number])]
        bar = "#" * bars[0] + "." * max(bars[1] - bars[0], 0)
        low, high = number / _TABLE_BINS, (number + 1) / _TABLE_BINS
        yield f"{low:>5.1f} - {high:.1f} {read[number]:>11,} {kept[number]:>11,}  {bar}"


def _tuning(tuning: Tuning) -> Iterator[str]:
    if not tuning.is_cut:
        yield "thresholds by class: nothing is cut at this limit, so none has a say"
        return
    verdict = "used" if tuning.wins else "not used: one threshold for all is as good or better"
    yield f"metric on {tuning.image_count:,} validation images; their share of the limit: {tuning.limit_bytes:,} bytes"
    yield f"{'one threshold':<44} {tuning.single:.5f}"
    for estimate, value in tuning.held_out.items():
        chosen = f"  <- {verdict}" if estimate == tuning.estimate else ""
        what = f"one a class, {estimate} AP, {tuning.folds} parts held back"
        yield f"{what:<44} {value:.5f}{chosen}"
    yield ""
    yield f"{'bytes of the file':>18} {'one threshold':>14} {'one a class':>12}  (the latter chosen on the same images)"
    for point in tuning.points:
        yield f"{point.size_bytes:>18,} {point.single:>14.5f} {point.per_class:>12.5f}"


def _nms(nms: NmsTuning, applied: bool) -> Iterator[str]:
    yield f"NMS as inferred ({nms.inferred}): metric {nms.inferred_metric:.5f} on the validation images"
    yield f"NMS chosen on other images than measured: {nms.held_out:.5f}; on all of them: {nms.best}"
    if not nms.wins:
        yield "not used: the settings as inferred are as good or better on images held back"
    elif applied:
        yield "used: NMS was repeated on the candidates of the predictions"
    else:
        yield (
            "not used: the predictions were made without --keep-candidates; run 'parkdet infer' again with "
            f"--iou-thres {nms.best.iou:g} --max-det {nms.best.max_det}, on both parts of the data"
        )
