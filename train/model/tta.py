"""Test-time augmentation in torch: three views of the float canvas, decoded and joined. Source: specification.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from parkdet.runtime.geometry import FloatArray
from parkdet.runtime.heads import decode_heads
from parkdet.train.model.network import Yolov5

_PAD = 0.447
"""Value of the canvas outside a scaled view: the mean of the images that the public weights were trained on."""


@dataclass(frozen=True, slots=True)
class View:
    """One look at the canvas: scaled, perhaps mirrored first; some levels of its heads are left out."""

    scale: float
    mirrored: bool
    drops: Literal["coarsest", "finest"] | None
    """The level whose boxes another view sees better."""


VIEWS = (View(1.0, False, "coarsest"), View(0.83, True, None), View(0.67, False, "finest"))


def view_of(images: Tensor, view: View, stride: int) -> Tensor:
    """The view's canvas of a batch (B, 3, H, W), padded right and bottom to multiples of `stride`."""
    if view.scale == 1 and not view.mirrored:
        return images
    mirrored = images.flip(3) if view.mirrored else images
    height, width = images.shape[2:]
    size = int(height * view.scale), int(width * view.scale)
    scaled = F.interpolate(mirrored, size=size, mode="bilinear", align_corners=False)
    padded = [math.ceil(side * view.scale / stride) * stride for side in (height, width)]
    return F.pad(scaled, (0, padded[1] - size[1], 0, padded[0] - size[0]), value=_PAD)


@torch.no_grad()
def forward_tta(model: Yolov5, images: Tensor) -> Tensor:
    """Decoded boxes of all views, (B, N, 5 + nc), in pixels of the canvas.

    `images`: float canvas (B, 3, H, W), RGB, 0 to 1. The coarsest level of the first view and the finest of the
    last are left out; the rest is joined in view order, for one NMS.
    """
    width = images.shape[3]
    joined: list[FloatArray] = []
    for view in VIEWS:
        heads = [head.float().cpu().numpy() for head in model(view_of(images, view, model.spec.stride_max))]
        boxes = decode_heads(heads, model.spec)
        sizes = [int(np.prod(head.shape[1:4])) for head in heads]
        if view.drops == "coarsest":
            boxes = boxes[:, : -sizes[-1]]
        elif view.drops == "finest":
            boxes = boxes[:, sizes[0] :]
        boxes[..., :4] /= np.float32(view.scale)
        if view.mirrored:
            boxes[..., 0] = width - boxes[..., 0]
        joined.append(boxes)
    return torch.from_numpy(np.concatenate(joined, axis=1))
