"""The views of test-time augmentation in numbers, and heads of views decoded: against loops and the specification."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from parkdet.runtime import ModelSpec, decode_heads
from parkdet.runtime.heads import decode_candidates
from parkdet.runtime.views import TTA_VIEWS, head_sources

SPEC = ModelSpec(
    class_names=("a", "b"),
    strides=(8, 16, 32),
    anchors=(((10.0, 13.0), (16.0, 30.0)), ((30.0, 61.0), (62.0, 45.0)), ((116.0, 90.0), (156.0, 198.0))),
    imgsz=192,
    tta=True,
)
CANVAS = (128, 192)


@pytest.mark.parametrize("stride", [32, 64])
def test_sizes_are_the_specifications_formulas(stride: int) -> None:
    for side in range(stride, 20_000, stride):
        for view in TTA_VIEWS:
            assert view.scaled(side) == int(side * view.scale)
            assert view.padded(side, stride) == math.ceil(side * view.scale / stride) * stride


def test_the_contests_canvas_has_163170_anchors() -> None:
    sides = {s.name: [s.view.padded(side, 64) // (8 << s.level) for side in (896, 1600)] for s in head_sources(4, True)}
    assert list(sides) == [
        "view0_head0", "view0_head1", "view0_head2",
        "view1_head0", "view1_head1", "view1_head2", "view1_head3",
        "view2_head1", "view2_head2", "view2_head3",
    ]  # fmt: skip
    assert sum(3 * rows * columns for rows, columns in sides.values()) == 163_170


def test_without_views_there_is_a_head_a_level() -> None:
    assert [(source.name, source.level) for source in head_sources(3, False)] == [
        ("head0", 0), ("head1", 1), ("head2", 2),
    ]  # fmt: skip


def heads_of_views(batch: int = 2) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(5)
    shapes = [
        tuple(source.view.padded(side, 32) // SPEC.strides[source.level] for side in CANVAS)
        for source in head_sources(3, True)
    ]
    return [rng.normal(0, 2, (batch, 2, h, w, 7)).astype(np.float32) for h, w in shapes]


def test_boxes_of_views_are_moved_back_to_the_canvas() -> None:
    """By the words of the specification: decoded on the view, divided by the nominal scale, mirrored back."""
    heads = heads_of_views()
    found = decode_heads(heads, SPEC)
    row = 0
    views = [(1.0, False, (0, 1)), (0.83, True, (0, 1, 2)), (0.67, False, (1, 2))]
    remaining = iter(heads)
    for scale, mirrored, levels in views:
        for level in levels:
            head = next(remaining)
            for anchor in range(2):
                for i in range(head.shape[2]):
                    for j in range(head.shape[3]):
                        s = [1 / (1 + math.exp(-float(v))) for v in head[1, anchor, i, j]]
                        stride, (width, height) = SPEC.strides[level], SPEC.anchors[level][anchor]
                        x = (2 * s[0] - 0.5 + j) * stride / scale
                        y = (2 * s[1] - 0.5 + i) * stride / scale
                        box = [192 - x if mirrored else x, y]
                        box += [(2 * s[2]) ** 2 * width / scale, (2 * s[3]) ** 2 * height / scale]
                        np.testing.assert_allclose(found[1, row], box + s[4:], rtol=1e-5, atol=1e-4)
                        row += 1
    assert row == found.shape[1]


def test_candidates_of_views_are_rows_of_the_full_decoding() -> None:
    heads = heads_of_views()
    full = decode_heads(heads, SPEC)
    for image, candidates in enumerate(decode_candidates(heads, SPEC, 0.4)):
        assert np.array_equal(candidates.anchor_index, np.flatnonzero(full[image, :, 4] > np.float32(0.4)))
        assert np.array_equal(candidates.decoded, full[image, candidates.anchor_index])


def test_heads_that_are_not_those_of_the_views_are_refused() -> None:
    heads = heads_of_views()
    with pytest.raises(ValueError, match="7 heads do not go with the 3 levels"):
        decode_heads(heads, dataclasses.replace(SPEC, tta=False))
    with pytest.raises(ValueError, match="3 test-time views"):
        decode_heads(heads[:3], SPEC)
    misplaced = [*heads[:3], heads[4], *heads[4:]]
    with pytest.raises(ValueError, match=r"view1_head1 has 4 x 5 cells; of a canvas of 128 x 192 it has 8 x 10"):
        decode_heads(misplaced, SPEC)
