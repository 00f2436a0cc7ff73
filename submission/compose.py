"""From run folders to what goes into the file: merged, tuned where that wins, and cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl

from parkdet.runtime.candidates import read_candidates
from parkdet.runtime.contest import ContestData
from parkdet.runtime.errors import UsageError
from parkdet.submission.cut import Fit, fit_batches
from parkdet.submission.lines import SubmissionFormat
from parkdet.submission.merge import MergeSettings, merge
from parkdet.submission.nms_search import NmsTuning, search_nms
from parkdet.submission.runs import NmsChoice, PredictionRun
from parkdet.submission.truth import truth_of
from parkdet.submission.tune import Tuning, Validation, scaled_limit, tune

Say = Callable[[str], None]
"""Takes a line of progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """What `compose` was asked for."""

    runs: Sequence[PredictionRun]
    """Over the test images, one a model."""
    tune_runs: Sequence[PredictionRun]
    """Over images with truth, the same models in the same order; none where nothing is tuned."""
    merge: MergeSettings
    weights: Mapping[str, float]
    """Of the metric."""
    form: SubmissionFormat
    limit_bytes: int
    image_count: int
    """Test images."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Composed:
    """What goes into the file, and what was tuned on the way."""

    fit: Fit
    tuning: Tuning | None = None
    nms: NmsTuning | None = None
    nms_used: NmsChoice | None = None
    """Other NMS settings than the run's, where they were applied to its candidates."""


def compose(asked: Composition, data: ContestData, say: Say) -> Composed:
    """The cut of the runs' detections. Raises UsageError for runs that do not go together."""
    _require_pairs(asked)
    if not asked.tune_runs:
        return Composed(fit=_cut(asked, None, None))
    validation, table_of = _validation(asked, data)
    if len(validation.image_ids) == len(data.train_labels().records):
        say(
            "warning: --tune: the run covers all labelled images, also those that the model learned from, of which it "
            "is surer than of others; make it with 'parkdet infer --split val'"
        )
    nms_tuning, nms = _nms(asked, validation, say)
    if nms is not None:
        validation = replace(validation, table=table_of(nms), max_det=nms.max_det)
    say("choosing thresholds by class on the validation images")
    tuning = tune(validation, asked.limit_bytes, asked.image_count)
    fit = _cut(asked, nms, tuning if tuning.wins else None)
    return Composed(fit=fit, tuning=tuning, nms=nms_tuning, nms_used=nms)


def _require_pairs(asked: Composition) -> None:
    folders = [run.folder.resolve() for run in asked.runs]
    if len(set(folders)) != len(folders):
        raise UsageError("--predictions: the same run is there twice; name different runs to merge")
    asked.merge.weights_of(len(asked.runs))
    if not asked.tune_runs:
        return
    if len(asked.tune_runs) != len(asked.runs):
        raise UsageError(
            f"--tune: {len(asked.tune_runs)} validation runs for {len(asked.runs)} runs to submit; "
            "give one for each --predictions, in the same order"
        )
    for mine, other in zip(asked.tune_runs, asked.runs, strict=True):
        # Both parts of a data set may number their images from 1: ids alone do not tell them apart.
        images = mine.fingerprint.get("image_list")
        same_images = images is not None and images == other.fingerprint.get("image_list")
        if same_images or mine.folder.resolve() == other.folder.resolve():
            raise UsageError(
                f"--tune {mine.folder}: is over the images to submit, of which there is no truth; "
                "make one with 'parkdet infer --split val'"
            )
        mine.require_same_scores(other)
    covered = [run.covered for run in asked.tune_runs]
    if any(images != covered[0] for images in covered):
        raise UsageError("--tune: the validation runs cover different images; make them over the same ones")


def _validation(asked: Composition, data: ContestData) -> tuple[Validation, Callable[[NmsChoice | None], pl.DataFrame]]:
    """The validation images with the runs' detections, and those with NMS repeated."""
    runs = asked.tune_runs
    for run in runs:
        if run.is_over_a_folder:
            raise UsageError(
                f"--tune {run.folder}: is over a folder, whose images have no truth in {data.train_json}; "
                "name a run of 'parkdet infer --split val'"
            )
    truth = truth_of(data, runs[0].covered, f"--tune {runs[0].folder}")

    def table_of(nms: NmsChoice | None) -> pl.DataFrame:
        return _together([run.table(nms) for run in runs], asked.merge)

    known = {category["id"] for category in truth["categories"]}
    table = table_of(None)
    unknown = sorted(set(table["category_id"].unique().to_list()) - known)
    if unknown:
        raise UsageError(f"--tune {runs[0].folder}: detects categories that the data set lacks, e.g. {unknown[0]}")
    # Merging lets more detections an image through than one run has.
    max_det = sum(run.nms.max_det if run.nms is not None else 100 for run in runs)
    return Validation(table=table, truth=truth, weights=asked.weights, max_det=max_det, form=asked.form), table_of


def _nms(asked: Composition, validation: Validation, say: Say) -> tuple[NmsTuning | None, NmsChoice | None]:
    """The search, where there are candidates to search in; and its settings, where they win and can be applied."""
    run, validation_run = asked.runs[0], asked.tune_runs[0]
    inferred = validation_run.nms
    if len(asked.runs) > 1 or not validation_run.has_candidates or inferred is None:
        return None, None
    share = scaled_limit(asked.limit_bytes, len(validation.image_ids), asked.image_count)
    found = search_nms(lambda: read_candidates(validation_run.folder), validation, share, inferred, say)
    return found, found.best if found.wins and run.has_candidates else None


def _cut(asked: Composition, nms: NmsChoice | None, tuning: Tuning | None) -> Fit:
    prices = tuning.prices if tuning is not None else None
    if len(asked.runs) == 1:
        return fit_batches(lambda: asked.runs[0].batches(nms), asked.limit_bytes, asked.form, prices)
    merged = _together([run.table() for run in asked.runs], asked.merge)
    return fit_batches(lambda: [merged], asked.limit_bytes, asked.form, prices)


def _together(tables: Iterable[pl.DataFrame], settings: MergeSettings) -> pl.DataFrame:
    tables = list(tables)
    return tables[0] if len(tables) == 1 else merge(tables, settings)
