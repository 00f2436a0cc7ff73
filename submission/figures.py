"""A submission in numbers: what was cut, class by class and by score, and what tuning was worth.

They are printed, shown on the run's page, and kept beside the submission as JSON (`submission.cut.json`), from
which `parkdet report` makes the page later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from parkdet.runtime.errors import ArtifactError
from parkdet.runtime.shards import write_atomically
from parkdet.submission.compose import Composed
from parkdet.submission.cut import HISTOGRAM_BINS, Fit
from parkdet.submission.nms_search import NmsTuning
from parkdet.submission.runs import NmsChoice
from parkdet.submission.tune import SizePoint, Tuning

_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassShare:
    """What one class has of the submission."""

    category_id: int
    name: str
    kept_count: int
    total_count: int
    """Its detections before the cut."""
    size_bytes: int
    """Of its lines in the file, each with its comma."""
    threshold: float | None
    """Its detections of a higher score are in the file; None where nothing was cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningFigures:
    """Thresholds by class against one for all, on the validation images."""

    image_count: int
    share_bytes: int
    """What of the limit falls to them."""
    folds: int
    is_cut: bool
    single: float
    held_out: Mapping[str, float]
    """By estimate."""
    estimate: str
    wins: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsFigures:
    """Other settings of NMS against those of the run, on the validation images."""

    inferred: str
    best: str
    inferred_metric: float
    held_out: float
    wins: bool
    applied: bool
    """Whether the submission's detections were made with the best ones."""
    remedy: str
    """What to type where they win and could not be applied."""
    max_dets: Sequence[int]
    """Ascending: the columns of `rows`."""
    rows: Sequence[tuple[float, Sequence[float]]]
    """By IoU the metric of every `max_dets`, of all that were tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmissionFigures:
    """The submission file in numbers."""

    size_bytes: int
    limit_bytes: int
    kept_count: int
    total_count: int
    """Detections before the cut."""
    without_area_count: int = 0
    repeated_count: int = 0
    threshold: float | None
    """Detections of a higher score are in the file; None where nothing was cut, or each class has its own."""
    tied_count: int = 0
    """Detections at the threshold."""
    tied_kept_count: int = 0
    per_class: Sequence[ClassShare]
    score_counts: Sequence[int]
    """Detections before the cut by score, in equal bins from 0 to 1."""
    kept_score_counts: Sequence[int]
    """Those in the file."""
    metric: str = ""
    """What the following figures are of."""
    points: Sequence[SizePoint] = ()
    """The metric by the size of the file, ascending, where there is truth."""
    tuning: TuningFigures | None = None
    nms: NmsFigures | None = None
    sources: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    """Where it came from: the submission, the runs, the data set."""

    def __post_init__(self) -> None:
        if len(self.score_counts) != len(self.kept_score_counts):
            raise ValueError(f"{len(self.score_counts)} bins before the cut, {len(self.kept_score_counts)} after it")

    @property
    def cut_count(self) -> int:
        """Detections left out for want of room."""
        return self.total_count - self.repeated_count - self.without_area_count - self.kept_count

    @classmethod
    def of_fit(cls, fit: Fit, class_names: Mapping[int, str]) -> Self:
        """Names by category id, its number where none is.

        Every named category has its row, and every other one that was detected.
        """
        kept_categories = fit.kept["category_id"].to_numpy()
        line_bytes = fit.format.line_bytes(fit.kept) + 1
        edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
        # A score that is written as 1 may lie a last place above it.
        kept_scores = np.minimum(fit.kept["score"].to_numpy(), 1)
        is_cut, of_classes = fit.cut_count > 0, bool(fit.class_thresholds)
        return cls(
            size_bytes=fit.size_bytes,
            limit_bytes=fit.limit_bytes,
            kept_count=fit.kept_count,
            total_count=fit.read_count,
            without_area_count=fit.without_area_count,
            repeated_count=fit.repeated_count,
            threshold=fit.threshold if is_cut and not of_classes else None,
            tied_count=fit.tied_count,
            tied_kept_count=fit.tied_kept_count,
            per_class=[
                ClassShare(
                    category_id=category,
                    name=class_names.get(category, str(category)),
                    kept_count=int((kept_categories == category).sum()),
                    total_count=fit.read_by_category.get(category, 0),
                    size_bytes=int(line_bytes[kept_categories == category].sum()),
                    threshold=fit.class_thresholds.get(category, fit.threshold) if is_cut else None,
                )
                for category in sorted({*class_names, *fit.read_by_category})
            ],
            score_counts=fit.score_counts.tolist(),
            kept_score_counts=np.histogram(kept_scores, bins=edges)[0].tolist(),
        )

    @classmethod
    def of(
        cls,
        composed: Composed,
        class_names: Mapping[int, str],
        metric: str,
        sources: Mapping[str, str | Sequence[str]],
    ) -> Self:
        """With what was tuned; `metric` as the user wrote it."""
        base = cls.of_fit(composed.fit, class_names)
        fields = {name: getattr(base, name) for name in cls.__dataclass_fields__}
        if composed.tuning is not None:
            fields |= {"metric": metric, "tuning": _tuning(composed.tuning), "points": composed.tuning.points}
        if composed.nms is not None:
            fields["nms"] = _nms(composed.nms, applied=composed.nms_used is not None)
        return cls(**{**fields, "sources": dict(sources)})

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all. ParkdetError where it cannot be written."""
        text = json.dumps({"version": _VERSION, **asdict(self)}, indent=1, ensure_ascii=False)
        write_atomically(path, (text + "\n").encode("utf-8", "backslashreplace"))

    @classmethod
    def read(cls, path: Path) -> Self:
        """ArtifactError where the file is not what `write` wrote."""
        try:
            values = json.loads(path.read_bytes())
            if values.pop("version") != _VERSION:
                raise ArtifactError(f"{path}: is of another version; run 'parkdet submit' again")
            values["per_class"] = [ClassShare(**entry) for entry in values["per_class"]]
            values["points"] = [SizePoint(**entry) for entry in values["points"]]
            if values["tuning"] is not None:
                values["tuning"] = TuningFigures(**values["tuning"])
            if values["nms"] is not None:
                values["nms"] = NmsFigures(**values["nms"])
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path}: is damaged ({error}); run 'parkdet submit' again") from error


def figures_path(submission: Path) -> Path:
    """Where the figures of a submission lie: `submission.cut.json` of `submission.json`."""
    return submission.with_name(f"{submission.stem}.cut.json")


def _tuning(tuning: Tuning) -> TuningFigures:
    return TuningFigures(
        image_count=tuning.image_count,
        share_bytes=tuning.limit_bytes,
        folds=tuning.folds,
        is_cut=tuning.is_cut,
        single=tuning.single,
        held_out=dict(tuning.held_out),
        estimate=tuning.estimate,
        wins=tuning.wins,
    )


def _nms(nms: NmsTuning, applied: bool) -> NmsFigures:
    ious = sorted({choice.iou for choice in nms.metrics})
    max_dets = sorted({choice.max_det for choice in nms.metrics})
    remedy = f"--iou-thres {nms.best.iou:g} --max-det {nms.best.max_det}" if nms.wins and not applied else ""
    return NmsFigures(
        inferred=str(nms.inferred),
        best=str(nms.best),
        inferred_metric=nms.inferred_metric,
        held_out=nms.held_out,
        wins=nms.wins,
        applied=applied,
        remedy=remedy,
        max_dets=max_dets,
        rows=[(iou, [nms.metrics[NmsChoice(iou, most)] for most in max_dets]) for iou in ious],
    )
