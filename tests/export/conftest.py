"""A network small enough to be exported in seconds, with detections of all scores."""

from __future__ import annotations

import pytest
import torch

from parkdet.runtime import ModelSpec
from parkdet.train.model.layout import Architecture, Stage
from parkdet.train.model.network import Yolov5, level_strides


def small_network(levels: int = 2, class_names: tuple[str, ...] = ("a", "b", "c"), imgsz: int = 320) -> Yolov5:
    """YOLOv5 with few channels and random weights whose heads are spread enough that there are detections."""
    anchors = (
        ((10.0, 13.0), (16.0, 30.0), (33.0, 23.0)),
        ((30.0, 61.0), (62.0, 45.0), (59.0, 119.0)),
        ((116.0, 90.0), (156.0, 198.0), (173.0, 126.0)),
    )
    architecture = Architecture(
        depth_multiple=0.33,
        width_multiple=0.125,
        stem_channels=64,
        stages=tuple(Stage(channels=64 << stage, repeats=1) for stage in range(levels + 1)),
        anchors=anchors[:levels],
    )
    rows = architecture.rows()
    torch.manual_seed(1)
    made = Yolov5(
        rows, ModelSpec(class_names=class_names, strides=level_strides(rows), anchors=architecture.anchors, imgsz=imgsz)
    )
    with torch.no_grad():
        # Fresh weights hardly look at the image; these carry its signal to the heads.
        for module in made.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        made.train()
        for _ in range(20):
            made(torch.rand(4, 3, 1, 1) * torch.rand(4, 3, 128, 128))
        for conv in made.head_convs:
            assert conv.bias is not None
            bias = conv.bias.view(3, -1)
            bias[:, 4], bias[:, 5:] = 0.0, 1.0
    return made.eval()


@pytest.fixture(scope="session")
def network() -> Yolov5:
    return small_network()
