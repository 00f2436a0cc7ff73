"""From raw heads to what enters NMS, against loops that follow the specification word by word."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from parkdet.runtime import ModelSpec, decode_heads, nms, ranking
from parkdet.runtime.heads import RawHead, decode_candidates
from parkdet.runtime.nms import NmsSettings, suppress
from parkdet.runtime.ranking import rank_heads, suppress_heads
from parkdet.runtime.views import head_sources

CONF = 0.2


def spec_of(num_classes: int, tta: bool) -> ModelSpec:
    return ModelSpec(
        class_names=tuple(f"class {i}" for i in range(num_classes)),
        strides=(8, 16),
        anchors=(((10.0, 13.0), (30.0, 20.0)), ((60.0, 50.0), (100.0, 90.0))),
        imgsz=64,
        tta=tta,
    )


def heads_of(seed: int, spec: ModelSpec, *, half: bool, damaged: bool, batch: int = 2) -> list[RawHead]:
    """Raw heads of a canvas of 32 x 64, where ties are common."""
    rng = np.random.default_rng(seed)
    heads: list[RawHead] = []
    for source in head_sources(len(spec.strides), spec.tta):
        cells = [source.view.padded(side, spec.stride_max) // spec.strides[source.level] for side in (32, 64)]
        raw = rng.normal(0, 2, (batch, spec.anchors_per_cell, *cells, spec.num_outputs)).round()
        if damaged:
            where = rng.integers(0, raw.size, 5)
            raw.reshape(-1)[where] = rng.choice([np.nan, np.inf, -np.inf], 5)
        heads.append(raw.astype(np.float16 if half else np.float32))
    return heads


def ranked_by_the_words(decoded: NDArray[np.float32], multi_label: bool) -> list[tuple[float, int]]:
    """(score, anchor * nc + class) of one image's candidates, best first, ties by the second."""
    classes = decoded.shape[1] - 5
    found: list[tuple[float, int]] = []
    for anchor, row in enumerate(decoded):
        if not np.isfinite(row[:5]).all() or not row[4] > np.float32(CONF):
            continue
        scores = [(float(row[4] * row[5 + c]), anchor * classes + c) for c in range(classes)]
        finite = [one for one in scores if np.isfinite(one[0])]
        if not multi_label:
            finite = sorted(finite, key=lambda one: (-one[0], one[1]))[:1]
        found += [one for one in finite if np.float32(one[0]) > np.float32(CONF)]
    return sorted(found, key=lambda one: (-one[0], one[1]))


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 20, 30_000]),
    st.sampled_from([1, 100, 80_000]),
)
def test_what_enters_nms_is_the_specifications(
    seed: int, num_classes: int, tta: bool, half: bool, damaged: bool, multi_label: bool, limit: int, stretch: int
) -> None:
    spec = spec_of(num_classes, tta)
    heads = heads_of(seed, spec, half=half, damaged=damaged)
    with mock.patch.object(ranking, "MAX_CANDIDATES", limit), mock.patch.object(ranking, "_STRETCH", stretch):
        found = rank_heads(heads, spec, NmsSettings(conf=CONF, multi_label=multi_label))
    for ranked, decoded in zip(found, decode_heads(heads, spec), strict=True):
        expected = ranked_by_the_words(decoded, multi_label)
        assert ranked.found == len(expected)
        assert list(zip(ranked.scores.tolist(), ranked.keys.tolist(), strict=True)) == expected[:limit]
        anchor, class_id = np.divmod(ranked.keys, num_classes)
        assert np.array_equal(ranked.class_ids, class_id)
        x, y, w, h = decoded[anchor, :4].T
        assert np.array_equal(ranked.xyxy.T, (x - w / 2, y - h / 2, x + w / 2, y + h / 2))


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 10, 300]),
    st.sampled_from([0.0, 0.45, 1.0]),
    st.sampled_from([1, 60, 30_000]),
    st.sampled_from([1, 10, 2048]),
)
def test_detections_do_not_depend_on_how_many_are_ranked_at_first(
    seed: int, multi_label: bool, agnostic: bool, max_det: int, iou: float, limit: int, first_look: int
) -> None:
    spec = spec_of(2, tta=False)
    heads = heads_of(seed, spec, half=False, damaged=False)
    chosen = NmsSettings(conf=CONF, iou=iou, max_det=max_det, multi_label=multi_label, agnostic=agnostic)
    with (
        mock.patch.object(ranking, "MAX_CANDIDATES", limit),
        mock.patch.object(nms, "MAX_CANDIDATES", limit),
        mock.patch.object(ranking, "_FIRST_LOOK", first_look),
    ):
        found = suppress_heads(heads, spec, chosen)
        expected = [suppress(candidates, chosen) for candidates in decode_candidates(heads, spec, CONF)]
    for (detections, counts), (right, right_counts) in zip(found, expected, strict=True):
        assert counts == right_counts
        for column in ("xyxy", "scores", "class_ids"):
            assert np.array_equal(getattr(detections, column), getattr(right, column))


def test_heads_without_a_candidate_give_no_detections() -> None:
    spec = spec_of(2, tta=False)
    for value in (-9.0, np.nan):
        heads = [np.full_like(head, value) for head in heads_of(0, spec, half=False, damaged=False)]
        assert [ranked.found for ranked in rank_heads(heads, spec, NmsSettings())] == [0, 0]
        assert [len(detections) for detections, _ in suppress_heads(heads, spec, NmsSettings())] == [0, 0]


def test_heads_that_do_not_fit_the_spec_are_refused() -> None:
    spec = spec_of(2, tta=False)
    heads = heads_of(0, spec, half=False, damaged=False)
    with pytest.raises(ValueError, match="1 heads do not go with the 2 levels"):
        suppress_heads(heads[:1], spec, NmsSettings())
    with pytest.raises(ValueError, match="head 1"):
        rank_heads([heads[0], heads[1][..., :6]], spec, NmsSettings())
