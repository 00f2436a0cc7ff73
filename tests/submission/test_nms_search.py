"""Every setting of NMS that is tried has the metric of NMS done with exactly it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from parkdet.runtime.candidates import ImageCandidates
from parkdet.runtime.geometry import Letterbox
from parkdet.runtime.nms import NmsSettings
from parkdet.submission import nms_search
from parkdet.submission.lines import SubmissionFormat
from parkdet.submission.nms_search import search_nms
from parkdet.submission.runs import NmsChoice, suppressed
from parkdet.submission.tune import Validation

World = Callable[..., tuple[pl.DataFrame, dict[str, Any]]]
INFERRED = NmsChoice(0.7, 50)
SIDE = 400


def candidates_of(table: pl.DataFrame, truth: dict[str, Any]) -> list[ImageCandidates]:
    found = []
    for image in truth["images"]:
        rows = table.filter(pl.col("image_id") == image["id"]).sort("score", descending=True)
        xywh = rows.select("x", "y", "w", "h").to_numpy()
        found.append(
            ImageCandidates(
                image_id=image["id"], letterbox=Letterbox((SIDE, SIDE), (SIDE, SIDE), (SIDE, SIDE), 0, 0),
                settings=NmsSettings(), xyxy=np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1),
                scores=rows["score"].to_numpy(), category_ids=rows["category_id"].to_numpy(),
            )
        )  # fmt: skip
    return found


@pytest.fixture
def world(small_world: World) -> tuple[list[ImageCandidates], Validation]:
    table, truth = small_world(7, images=40)
    copies = table.with_columns(pl.col("x") + pl.col("w") * 0.15, pl.col("score") * 0.9)
    candidates = candidates_of(pl.concat([table, copies]), truth)
    inferred = suppressed(candidates, INFERRED)
    form, weights = SubmissionFormat(), {"map50": 0.1, "map75": 0.9}
    return candidates, Validation(table=inferred, truth=truth, weights=weights, max_det=50, form=form)


def test_every_choice_is_measured_as_if_inferred_with_it(
    world: tuple[list[ImageCandidates], Validation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nms_search, "MAX_DETS", (3, 8, 50))
    candidates, validation = world
    limit = validation.cut(10**9).size_bytes * 2 // 3
    lines: list[str] = []
    tuning = search_nms(lambda: iter(candidates), validation, limit, INFERRED, lines.append)
    assert len(lines) == len(nms_search.IOUS)
    assert len(tuning.metrics) == len(nms_search.IOUS) * 3
    for choice, value in tuning.metrics.items():
        mine = replace(validation, table=suppressed(candidates, choice), max_det=choice.max_det)
        assert value == pytest.approx(mine.metric_of(mine.cut(limit).kept), abs=1e-12)
    assert tuning.metrics[tuning.best] == max(tuning.metrics.values())
    assert tuning.inferred_metric == pytest.approx(tuning.metrics[INFERRED])
    assert tuning.best.iou < INFERRED.iou
    assert tuning.wins == (tuning.held_out > tuning.inferred_metric)


def test_settings_that_are_best_already_stay(
    world: tuple[list[ImageCandidates], Validation], monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates, validation = world
    monkeypatch.setattr(nms_search, "IOUS", (0.999,))
    monkeypatch.setattr(nms_search, "MAX_DETS", (50,))
    tuning = search_nms(lambda: candidates, validation, 10**9, INFERRED, lambda _: None)
    assert tuning.best == INFERRED
    assert not tuning.wins
    assert tuning.held_out == tuning.inferred_metric
