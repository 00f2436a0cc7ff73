"""The IoU and `max_det` of NMS that suit the contest's metric, chosen on candidates kept before NMS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from parkdet.runtime.candidates import ImageCandidates
from parkdet.runtime.evaluation_columns import evaluation_columns
from parkdet.submission.ap_curves import Matches, match, measured_curves
from parkdet.submission.runs import NmsChoice, suppressed
from parkdet.submission.tune import Validation, folds_of

IOUS = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
MAX_DETS = (20, 50, 100, 200)


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsTuning:
    """What other settings of NMS do for the metric, and whether they are to be used."""

    inferred: NmsChoice
    best: NmsChoice
    """Of all validation images."""
    inferred_metric: float
    """On the validation images, cut by one threshold to the limit's share."""
    held_out: float
    """The same with settings that were chosen without the images on which they are measured."""
    metrics: Mapping[NmsChoice, float]
    """Of every choice tried."""

    @property
    def wins(self) -> bool:
        """Whether choosing is better on images that were kept back."""
        return self.best != self.inferred and self.held_out > self.inferred_metric


def search_nms(
    candidates: Callable[[], Iterable[ImageCandidates]],
    validation: Validation,
    limit_bytes: int,
    inferred: NmsChoice,
    say: Callable[[str], None],
) -> NmsTuning:
    """Tries every IoU and `max_det` on the validation images' candidates, which are read anew for every IoU.

    `limit_bytes` is that of the validation images' own file: more detections an image leave less room for each.
    `say` takes a line of progress.
    """
    validation.require_truth()
    images = validation.image_ids
    max_dets = sorted({*MAX_DETS, inferred.max_det})
    kept: dict[NmsChoice, pl.DataFrame] = {}
    matches: dict[NmsChoice, Matches] = {}
    ious = sorted({*IOUS, inferred.iou})
    for number, iou in enumerate(ious, start=1):
        say(f"NMS at IoU {iou:g} on the candidates of the validation images ({number} of {len(ious)})")
        most = suppressed(candidates(), NmsChoice(iou, max_dets[-1]))
        # NMS stops at max_det: fewer are the first of an image.
        rank = most.select(pl.int_range(pl.len()).over("image_id")).to_series()
        for max_det in max_dets:
            choice = NmsChoice(iou, max_det)
            mine = replace(validation, table=most.filter(rank < max_det), max_det=max_det)
            kept[choice] = mine.cut(limit_bytes).kept
            found, truths = evaluation_columns(kept[choice], validation.truth)
            matches[choice] = match(found, truths, validation.weights, max_det)
    everywhere = np.ones(len(images), np.bool_)
    metrics = {choice: _metric(found, everywhere) for choice, found in matches.items()}
    parts = []
    for part in folds_of(images):
        others = ~np.isin(images, part)
        # The inferred settings first: of equals they stay.
        chosen = max([inferred, *matches], key=lambda choice, others=others: _metric(matches[choice], others))  # type: ignore[misc]
        rows = kept[chosen]
        parts.append(rows.filter(pl.Series(np.isin(rows["image_id"].to_numpy(), part))))
    most_allowed = replace(validation, max_det=max_dets[-1])
    return NmsTuning(
        inferred=inferred,
        best=max([inferred, *metrics], key=lambda choice: metrics[choice]),
        inferred_metric=most_allowed.metric_of(kept[inferred]),
        held_out=most_allowed.metric_of(pl.concat(parts)),
        metrics=metrics,
    )


def _metric(matches: Matches, is_in: NDArray[np.bool_]) -> float:
    """On some of the images: a mask by place."""
    return float(sum(curve.values[-1] for curve in measured_curves(matches.of_images(is_in)).values()))
