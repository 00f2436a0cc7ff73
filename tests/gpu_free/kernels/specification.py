"""What the kernels must give: runtime/heads.py and nms.py with the kernels' exponential in the place of numpy's."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime import heads as heads_module
from parkdet.runtime import nms as nms_module
from parkdet.runtime.detections import Detections
from parkdet.runtime.geometry import FloatArray
from parkdet.runtime.heads import RawHead, decode_candidates
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.nms import NmsCounts, NmsSettings, suppress

_POLYNOMIAL = (1.98993919e-4, 1.39337336e-3, 8.33329838e-3, 4.1666463e-2, 1.66666672e-1, 0.5)


def exponential(x: FloatArray) -> FloatArray:
    """`parkdet::exponential` in numpy: float32 operations in the same order, so the same bits."""
    f32 = np.float32
    x = np.minimum(np.maximum(x, f32(-40)), f32(89))
    n = np.rint(x * f32(1.44269504))
    r = (x - n * f32(0.693359375)) - n * f32(-2.12194440e-4)
    q = np.full_like(r, f32(_POLYNOMIAL[0]))
    for coefficient in _POLYNOMIAL[1:]:
        q = q * r + f32(coefficient)
    with np.errstate(over="ignore"):
        return np.asarray(np.ldexp(f32(1) + (r + r * r * q), np.nan_to_num(n).astype(np.int32)), np.float32)


def sigmoid(raw: NDArray[np.floating]) -> FloatArray:
    """`parkdet::sigmoid` in numpy."""
    return np.asarray(np.float32(1) / (np.float32(1) + exponential(-np.asarray(raw, np.float32))), np.float32)


def expected(
    heads: Sequence[RawHead], spec: ModelSpec, settings: NmsSettings, max_candidates: int = nms_module.MAX_CANDIDATES
) -> list[tuple[Detections, NmsCounts]]:
    """Detections in canvas pixels and counts of each image."""
    with (
        mock.patch.object(heads_module, "sigmoid", sigmoid),
        mock.patch.object(nms_module, "MAX_CANDIDATES", max_candidates),
    ):
        return [suppress(candidates, settings) for candidates in decode_candidates(heads, spec, settings.conf)]


def difference(got: Sequence[tuple[Detections, NmsCounts]], want: Sequence[tuple[Detections, NmsCounts]]) -> str:
    """What differs to the bit, or nothing."""
    for image, ((found, counts), (right, right_counts)) in enumerate(zip(got, want, strict=True)):
        if counts != right_counts:
            return f"image {image}: {counts}, not {right_counts}"
        for name in ("class_ids", "scores", "xyxy"):
            a, b = getattr(found, name), getattr(right, name)
            if a.tobytes() != b.tobytes():
                return f"image {image}: {name} {a}, not {b}"
    return ""
