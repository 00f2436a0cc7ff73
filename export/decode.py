"""Raw heads to boxes inside a graph (`--head decoded`): the formulas of `runtime/heads.py` in torch, float32.

Shapes: B images, na anchors a cell, h x w cells, nc classes, N = sum of na * h * w over the heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.views import HeadSource, head_sources


def decoded_boxes(heads: Sequence[Tensor], spec: ModelSpec, tta: bool, canvas_width: int) -> Tensor:
    """(B, N, 5 + nc) float32 of raw heads (B, na, h, w, 5 + nc): cx, cy, w, h in canvas pixels, objectness, classes."""
    sources = head_sources(len(spec.strides), tta)
    return torch.cat(
        [_decoded(head, spec, source, canvas_width) for head, source in zip(heads, sources, strict=True)], 1
    )


def _decoded(raw: Tensor, spec: ModelSpec, source: HeadSource, canvas_width: int) -> Tensor:
    # A half-precision coordinate has a step of 1 px above 1024: float32 from here on, whatever the body is.
    values = raw.float().sigmoid()
    rows, columns = values.shape[2:4]
    column = torch.arange(columns, dtype=torch.float32).view(1, 1, 1, -1)
    row = torch.arange(rows, dtype=torch.float32).view(1, 1, -1, 1)
    stride = float(spec.strides[source.level])
    anchors = torch.tensor(spec.anchors[source.level], dtype=torch.float32).view(1, -1, 1, 1, 2)
    x = (values[..., 0] * 2 - 0.5 + column) * stride
    y = (values[..., 1] * 2 - 0.5 + row) * stride
    sides = values[..., 2:4] * 2
    wh = sides * sides * anchors
    scale = source.view.scale
    if source.view.percent != 100:
        x, y, wh = x / scale, y / scale, wh / scale
    if source.view.mirrored:
        x = canvas_width - x
    boxes = torch.cat((x.unsqueeze(-1), y.unsqueeze(-1), wh, values[..., 4:]), -1)
    return boxes.flatten(1, 3)
