"""Test-time augmentation in torch: three views of the float canvas, decoded and joined. Source: specification.md."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from parkdet.runtime.heads import decode_heads
from parkdet.runtime.views import TTA_VIEWS, VIEW_PAD, View
from parkdet.train.model.network import Yolov5


def view_of(images: Tensor, view: View, stride: int) -> Tensor:
    """The view's canvas of a batch (B, 3, H, W), padded right and bottom to multiples of `stride`."""
    if view.percent == 100 and not view.mirrored:
        return images
    mirrored = images.flip(3) if view.mirrored else images
    height, width = images.shape[2:]
    size = view.scaled(height), view.scaled(width)
    scaled = F.interpolate(mirrored, size=size, mode="bilinear", align_corners=False)
    right, bottom = view.padded(width, stride) - size[1], view.padded(height, stride) - size[0]
    return F.pad(scaled, (0, right, 0, bottom), value=VIEW_PAD)


def view_heads(model: Yolov5, images: Tensor) -> list[Tensor]:
    """The raw heads of every view, the dropped levels left out: what a graph with `tta` returns.

    `images`: float canvas (B, 3, H, W), RGB, 0 to 1.
    """
    heads: list[Tensor] = []
    for view in TTA_VIEWS:
        of_view = model(view_of(images, view, model.spec.stride_max))
        heads += [of_view[level] for level in view.levels(len(of_view))]
    return heads


@torch.no_grad()
def forward_tta(model: Yolov5, images: Tensor) -> Tensor:
    """Decoded boxes of all views, (B, N, 5 + nc), in pixels of the canvas, in view order, for one NMS.

    `images`: float canvas (B, 3, H, W), RGB, 0 to 1.
    """
    heads = [head.float().cpu().numpy() for head in view_heads(model, images)]
    return torch.from_numpy(decode_heads(heads, dataclasses.replace(model.spec, tta=True)))
