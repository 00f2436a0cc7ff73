"""The building blocks of YOLOv5 v6, with the attribute names that the public checkpoints' state dicts use.

Shapes: B images, C channels, H x W cells. Source: the YOLOv5 v6 architecture.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NORM_EPS = 1e-3
NORM_MOMENTUM = 0.03


class Conv(nn.Module):
    """Convolution without bias, batch normalisation, SiLU: (B, Cin, H, W) to (B, Cout, H / s, W / s)."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, padding: int | None = None):
        super().__init__()
        pad = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, pad, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(c_out, eps=NORM_EPS, momentum=NORM_MOMENTUM)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class Bottleneck(nn.Module):
    """A 1 x 1 and a 3 x 3 convolution, with the input added where `shortcut` says so."""

    def __init__(self, channels: int, shortcut: bool = True):
        super().__init__()
        self.cv1 = Conv(channels, channels, 1)
        self.cv2 = Conv(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cv2(self.cv1(x))
        return x + out if self.shortcut else out


class C3(nn.Module):
    """Cross-stage partial block of three convolutions around `repeats` bottlenecks."""

    def __init__(self, c_in: int, c_out: int, repeats: int = 1, shortcut: bool = True):
        super().__init__()
        hidden = c_out // 2
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = Conv(c_in, hidden, 1)
        self.cv3 = Conv(2 * hidden, c_out, 1)
        self.m = nn.Sequential(*(Bottleneck(hidden, shortcut) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))
        return out


class SPPF(nn.Module):
    """Spatial pyramid pooling as three poolings in a row: the same as windows of k, 2k - 1 and 3k - 2."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 5):
        super().__init__()
        hidden = c_in // 2
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = Conv(hidden * 4, c_out, 1)
        self.m = nn.MaxPool2d(kernel, stride=1, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [self.cv1(x)]
        for _ in range(3):
            pooled.append(self.m(pooled[-1]))
        out: Tensor = self.cv2(torch.cat(pooled, 1))
        return out


class Concat(nn.Module):
    """Concatenation along the channels."""

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, 1)


class Detect(nn.Module):
    """One 1 x 1 convolution a level: features to raw heads (B, na, h, w, 5 + nc), nothing decoded."""

    anchors: Tensor

    def __init__(self, channels: list[int], strides: tuple[int, ...], anchors_px: Tensor, num_outputs: int):
        """`anchors_px` (levels, na, 2): widths and heights in canvas pixels."""
        super().__init__()
        self.num_outputs = num_outputs
        self.anchors_per_cell = anchors_px.shape[1]
        # The public state dicts hold the anchors in cells of their level.
        self.register_buffer("anchors", anchors_px / torch.tensor(strides).view(-1, 1, 1))
        self.m = nn.ModuleList(nn.Conv2d(c, num_outputs * self.anchors_per_cell, 1) for c in channels)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        heads = []
        for features, conv in zip(x, self.m, strict=True):
            raw = conv(features)
            batch, _, height, width = raw.shape
            heads.append(
                raw.view(batch, self.anchors_per_cell, self.num_outputs, height, width)
                .permute(0, 1, 3, 4, 2)
                .contiguous()
            )
        return heads


@torch.no_grad()
def fold_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> nn.Conv2d:
    """A convolution with bias that computes what `conv` and then `norm` (with its running statistics) do."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("the normalisation has no running statistics to fold")
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]  # always a pair after construction
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        bias=True,
    ).to(conv.weight.device, conv.weight.dtype)
    folded.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
    assert folded.bias is not None
    folded.bias.copy_(norm.bias - norm.running_mean * scale)
    return folded.requires_grad_(False)
