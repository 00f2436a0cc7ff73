"""The network: rows of layers, built, run, fused. Its output is the raw heads in training and inference alike."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from importlib import resources

import torch
from torch import Tensor, nn

from parkdet.runtime.errors import UsageError
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.settings import load_settings
from parkdet.train.model.layers import C3, SPPF, Concat, Conv, Detect, fold_norm
from parkdet.train.model.layout import Architecture, LayerRow

INPUT_CHANNELS = 3


class Yolov5(nn.Module):
    """YOLOv5 v6. Input (B, 3, H, W) RGB from 0 to 1; output one raw head (B, na, h, w, 5 + nc) a level.

    H and W are multiples of the largest stride. State-dict names are those of the public checkpoints.
    """

    def __init__(self, rows: Sequence[LayerRow], spec: ModelSpec):
        super().__init__()
        self.spec = spec
        self.rows = tuple(rows)
        self._sources = [_sources(row, index) for index, row in enumerate(self.rows)]
        self._kept = {i for index, of_row in enumerate(self._sources) for i in of_row if i != index - 1}
        channels = [INPUT_CHANNELS]  # of the image, then of every row's output: one place further than the rows
        strides = [1]
        layers: list[nn.Module] = []
        for row, of_row in zip(self.rows, self._sources, strict=True):
            channels_in = [channels[i + 1] for i in of_row]
            strides_in = [strides[i + 1] for i in of_row]
            layers.append(self._build(row, channels_in, strides_in))
            channels.append(row.channels or sum(channels_in))
            strides.append(_stride_out(row, strides_in[0]))
        self.model = nn.ModuleList(layers)

    def _build(self, row: LayerRow, channels: list[int], strides: list[int]) -> nn.Module:
        if row.kind == "Conv":
            return Conv(channels[0], row.channels, row.kernel, row.stride, row.padding)
        if row.kind == "C3":
            return C3(channels[0], row.channels, row.repeats, row.shortcut)
        if row.kind == "SPPF":
            return SPPF(channels[0], row.channels, row.kernel)
        if row.kind == "Upsample":
            return nn.Upsample(scale_factor=2, mode="nearest")
        if row.kind == "Concat":
            return Concat()
        if tuple(strides) != self.spec.strides:
            raise ValueError(f"the layers' strides {strides} are not the spec's {self.spec.strides}")
        anchors = torch.tensor(self.spec.anchors, dtype=torch.float32)
        return Detect(channels, self.spec.strides, anchors, self.spec.num_outputs)

    @classmethod
    def from_state(cls, rows: Sequence[LayerRow], spec: ModelSpec, state: Mapping[str, Tensor]) -> Yolov5:
        """The network of these rows with copies of these tensors, float32, eval mode; other tensors are left out.

        ValueError where one is missing, of another shape or not there in full. Until that is known nothing is
        allocated: a file of a few bytes may describe a network larger than the memory.
        """
        if sum(row.repeats for row in rows) > len(state):
            raise ValueError(f"its layers need more than the {len(state)} tensors that it holds")
        with torch.device("meta"):
            network = cls(rows, spec)
        expected = network.state_dict()
        wrong = [name for name, tensor in expected.items() if name not in state or state[name].shape != tensor.shape]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(expected)} tensors are missing or of another shape, first {wrong[0]}"
            )
        storages = {state[name].untyped_storage() for name in expected}
        held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        if held < sum(state[name].numel() * state[name].element_size() for name in expected):
            raise ValueError("its tensors overlap in the file")
        copies = {
            name: state[name].to(tensor.dtype, copy=True, memory_format=torch.contiguous_format)
            for name, tensor in expected.items()
        }
        network.load_state_dict(copies, assign=True)
        return network.eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        kept: dict[int, Tensor] = {}
        x = images
        for index, (sources, layer) in enumerate(zip(self._sources, self.model, strict=True)):
            tensors = [x if i == index - 1 else kept[i] for i in sources]
            x = layer(tensors) if isinstance(layer, Concat | Detect) else layer(tensors[0])
            if index in self._kept:
                kept[index] = x
        heads: list[Tensor] = x  # type: ignore[assignment]  # the last layer is Detect
        return heads

    @property
    def detect(self) -> Detect:
        """The last layer."""
        layer = self.model[-1]
        assert isinstance(layer, Detect)
        return layer

    @property
    def first_conv(self) -> nn.Conv2d:
        """The convolution that sees the image."""
        layer = self.model[0]
        assert isinstance(layer, Conv)
        return layer.conv

    @property
    def head_convs(self) -> tuple[nn.Conv2d, ...]:
        """The last convolution of every level, finest first."""
        convs = tuple(conv for conv in self.detect.m if isinstance(conv, nn.Conv2d))
        assert len(convs) == len(self.spec.strides)
        return convs

    def set_anchors(self, anchors: tuple[tuple[tuple[float, float], ...], ...]) -> None:
        """Replace the anchors of every level, in canvas pixels, in the spec and in the last layer."""
        self.spec = dataclasses.replace(self.spec, anchors=anchors)
        strides = torch.tensor(self.spec.strides, dtype=torch.float32).view(-1, 1, 1)
        self.detect.anchors.copy_(torch.tensor(anchors, dtype=torch.float32) / strides)

    def fused(self) -> Yolov5:
        """A copy in eval mode whose normalisations are folded into the convolutions."""
        network = copy.deepcopy(self).eval()
        for module in network.modules():
            if isinstance(module, Conv) and isinstance(module.bn, nn.BatchNorm2d | nn.SyncBatchNorm):
                module.conv = fold_norm(module.conv, module.bn)
                module.bn = nn.Identity()
        return network

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def _sources(row: LayerRow, index: int) -> tuple[int, ...]:
    """Rows that a row reads, counted from 0; -1 is the image."""
    return tuple(source if source >= 0 else index + source for source in row.inputs)


def _stride_out(row: LayerRow, stride_in: int) -> int:
    return stride_in // 2 if row.kind == "Upsample" else stride_in * row.stride


def level_strides(rows: Sequence[LayerRow]) -> tuple[int, ...]:
    """Stride in pixels of every level that Detect, the last row, reads."""
    strides = [1]
    for index, row in enumerate(rows):
        strides_in = [strides[i + 1] for i in _sources(row, index)]
        if row.kind == "Detect":
            return tuple(strides_in)
        strides.append(_stride_out(row, strides_in[0]))
    raise ValueError("the rows have no Detect")


def load_architecture(name: str) -> Architecture:
    """One of the shipped networks by name, such as `yolov5x6`. UsageError lists them where it is another."""
    folder = resources.files("parkdet.configs") / "models"
    known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if "-" not in entry.name)
    if name not in known:
        raise UsageError(f"there is no model '{name}'; the models are {', '.join(known)}")
    with resources.as_file(folder) as path:
        return load_settings(Architecture, path / f"{name}.yaml")


def build_network(
    name: str,
    class_names: Sequence[str],
    imgsz: int,
    category_ids: Sequence[int] = (),
    anchors: tuple[tuple[tuple[float, float], ...], ...] | None = None,
) -> Yolov5:
    """A network of a shipped architecture with fresh random weights and the usual prior in the heads' biases."""
    architecture = load_architecture(name)
    rows = architecture.rows()
    spec = ModelSpec(
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
        strides=level_strides(rows),
        anchors=anchors or architecture.anchors,
        imgsz=imgsz,
    )
    network = Yolov5(rows, spec)
    set_prior_biases(network)
    return network


def build_network_like(network: Yolov5, spec: ModelSpec) -> Yolov5:
    """Fresh random weights in the same layers, for another spec (its classes, usually)."""
    fresh = Yolov5(network.rows, spec)
    set_prior_biases(fresh)
    return fresh


@torch.no_grad()
def set_prior_biases(network: Yolov5) -> None:
    """Start the heads at about eight objects in an image of 640 px and a probability of 0.6 / nc a class.

    Source: focal loss (arXiv 1708.02002), section 3.3, as YOLOv5 applies it.
    """
    spec = network.spec
    for conv, stride in zip(network.head_convs, spec.strides, strict=True):
        assert conv.bias is not None
        bias = conv.bias.view(spec.anchors_per_cell, -1)
        bias[:, 4] += math.log(8 / (640 / stride) ** 2)
        bias[:, 5:] += math.log(0.6 / (spec.num_classes - 0.99999))
