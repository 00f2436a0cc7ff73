"""A submission's figures as text: the cut, the classes, the scores, and what tuning was worth."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from parkdet.submission.figures import NmsFigures, SubmissionFigures, TuningFigures

_TABLE_BINS = 10
"""Rows of the printed histogram."""
_BAR = 40
"""Characters of its longest bar."""


def summary(figures: SubmissionFigures) -> str:
    """All of it, in blocks."""
    parts = [_cut(figures), _by_category(figures), _by_score(figures)]
    if figures.nms is not None:
        parts.append(_nms(figures.nms))
    if figures.tuning is not None:
        parts.append(_tuning(figures.tuning, figures.metric))
    if figures.points:
        parts.append(_by_size(figures))
    return "\n\n".join("\n".join(part) for part in parts)


def _cut(figures: SubmissionFigures) -> Iterator[str]:
    threshold = "nothing was cut"
    if figures.cut_count and figures.threshold is None:
        threshold = "one a class, see below"
    elif figures.threshold is not None:
        tied = f"{figures.tied_kept_count:,} of {figures.tied_count:,} at it"
        threshold = f"{figures.threshold:.7g} (all above it, and {tied})"
    yield f"{'detections read':<20} {figures.total_count:,}"
    yield f"{'no area once rounded':<20} {figures.without_area_count:,}"
    yield f"{'repeated':<20} {figures.repeated_count:,}"
    yield f"{'cut':<20} {figures.cut_count:,}"
    yield f"{'kept':<20} {figures.kept_count:,}"
    yield f"{'threshold':<20} {threshold}"
    yield f"{'bytes':<20} {figures.size_bytes:,} of a limit of {figures.limit_bytes:,}"


def _by_category(figures: SubmissionFigures) -> Iterator[str]:
    """One line a class; the name comes last, because its width on the screen is not known."""
    yield f"{'category':>8} {'read':>11} {'kept':>11} {'left out':>11} {'bytes':>12} {'threshold':>10}  name"
    for share in figures.per_class:
        threshold = "-" if share.threshold is None else f"{share.threshold:.4g}"
        yield (
            f"{share.category_id:>8} {share.total_count:>11,} {share.kept_count:>11,} "
            f"{share.total_count - share.kept_count:>11,} {share.size_bytes:>12,} {threshold:>10}  {share.name}"
        )


def _by_score(figures: SubmissionFigures) -> Iterator[str]:
    """What was read and kept, by score; bars on a logarithmic scale, for most scores are low."""
    read, kept = (
        np.array(counts, np.int64).reshape(_TABLE_BINS, -1).sum(axis=1)
        for counts in (figures.score_counts, figures.kept_score_counts)
    )
    most = float(np.log1p(max(int(read.max()), 1)))
    yield f"{'score':>11} {'read':>11} {'kept':>11}"
    for number in range(_TABLE_BINS):
        bars = [round(_BAR * float(np.log1p(count)) / most) for count in (kept[number], read[number])]
        bar = "#" * bars[0] + "." * max(bars[1] - bars[0], 0)
        low, high = number / _TABLE_BINS, (number + 1) / _TABLE_BINS
        yield f"{low:>5.1f} - {high:.1f} {read[number]:>11,} {kept[number]:>11,}  {bar}".rstrip()


def _tuning(tuning: TuningFigures, metric: str) -> Iterator[str]:
    if not tuning.is_cut:
        yield "thresholds by class: nothing is cut at this limit, so none has a say"
        return
    verdict = "used" if tuning.wins else "not used: one threshold for all is as good or better"
    share = f"their share of the limit: {tuning.share_bytes:,} bytes"
    yield f"{metric} on {tuning.image_count:,} validation images; {share}"
    yield f"{'one threshold':<44} {tuning.single:.5f}"
    for estimate, value in tuning.held_out.items():
        chosen = f"  <- {verdict}" if estimate == tuning.estimate else ""
        what = f"one a class, {estimate} AP, {tuning.folds} parts held back"
        yield f"{what:<44} {value:.5f}{chosen}"


def _by_size(figures: SubmissionFigures) -> Iterator[str]:
    by_class = any(point.per_class is not None for point in figures.points)
    note = f" {'one a class':>12}  (chosen on the images it is measured on)" if by_class else ""
    yield f"{'bytes of the file':>18} {'one threshold':>14}{note}"
    for point in figures.points:
        per_class = "" if point.per_class is None else f" {point.per_class:>12.5f}"
        yield f"{point.size_bytes:>18,} {point.single:>14.5f}{per_class}"


def _nms(nms: NmsFigures) -> Iterator[str]:
    yield f"NMS as inferred ({nms.inferred}): metric {nms.inferred_metric:.5f} on the validation images"
    yield f"NMS chosen on other images than measured: {nms.held_out:.5f}; on all of them: {nms.best}"
    if not nms.wins:
        yield "not used: the settings as inferred are as good or better on images held back"
    elif nms.applied:
        yield "used: NMS was repeated on the candidates of the predictions"
    else:
        yield (
            "not used: the predictions were made without --keep-candidates; run 'parkdet infer' again with "
            f"{nms.remedy}, on both parts of the data"
        )
