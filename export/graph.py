"""Checkpoint to ONNX: uint8 BGR canvases in, raw heads out, the model spec in the metadata."""

from __future__ import annotations

import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from parkdet.runtime.errors import UsageError
from parkdet.runtime.model_spec import SPEC_KEY, ModelSpec, TensorSpec
from parkdet.train.model.network import Yolov5

if TYPE_CHECKING:
    import onnx

OPSET = 20
INPUT_NAME = "images"


class GraphSource(nn.Module):
    """What is exported: the fused network behind the conversion from OpenCV's pixels."""

    def __init__(self, network: Yolov5):
        super().__init__()
        self.network = network.fused().float()
        with torch.no_grad():
            # OpenCV decodes to BGR, the network was trained on RGB: reversing the weights costs nothing.
            self.network.first_conv.weight.copy_(self.network.first_conv.weight.flip(1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """uint8 (B, H, W, 3) BGR canvases to raw heads."""
        # The cast stands before the transposition: TensorRT has no uint8 transposition.
        heads: list[Tensor] = self.network(images.float().permute(0, 3, 1, 2) / 255)
        return heads


def build_graph(network: Yolov5, canvas_hw: tuple[int, int] | None = None, batch: int | None = None) -> onnx.ModelProto:
    """ONNX of a network: any canvas (multiples of the largest stride) and any batch unless they are given.

    UsageError where a side of the canvas is no multiple of the largest stride.
    """
    spec = network.spec
    stride = spec.stride_max
    if canvas_hw is not None and any(side < stride or side % stride for side in canvas_hw):
        raise UsageError(
            f"a canvas of {canvas_hw[0]}x{canvas_hw[1]} cannot be: each side must be a multiple of {stride}"
        )
    height, width = canvas_hw or (4 * stride, 5 * stride)  # any size where the axes are dynamic
    example = torch.zeros(batch or 2, height, width, 3, dtype=torch.uint8)
    axes: dict[int, object] = {}
    if batch is None:
        axes[0] = torch.export.Dim("batch", min=1, max=1024)
    if canvas_hw is None:
        axes[1] = stride * torch.export.Dim("rows", min=1, max=1024)
        axes[2] = stride * torch.export.Dim("columns", min=1, max=1024)
    names = [f"head{level}" for level in range(len(spec.strides))]
    with _quiet():
        program = torch.onnx.export(
            GraphSource(network).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=names,
            dynamic_shapes={"images": axes} if axes else None,
        )
    assert program is not None
    model = program.model_proto
    _describe(model, spec, canvas_hw, batch)
    return model


def _describe(model: onnx.ModelProto, spec: ModelSpec, canvas_hw: tuple[int, int] | None, batch: int | None) -> None:
    """Replace the exporter's metadata by the spec with the graph's inputs and outputs in it."""
    rows, columns = canvas_hw or (-1, -1)
    outputs = tuple(
        TensorSpec(
            name=f"head{level}",
            dtype="float32",
            shape=(
                batch or -1,
                spec.anchors_per_cell,
                rows // stride if canvas_hw else -1,
                columns // stride if canvas_hw else -1,
                spec.num_outputs,
            ),
        )
        for level, stride in enumerate(spec.strides)
    )
    images = TensorSpec(name=INPUT_NAME, dtype="uint8", shape=(batch or -1, rows, columns, 3))
    described = dataclasses.replace(spec, inputs=(images,), outputs=outputs)
    # The exporter's notes hold file names and stack traces of the machine that exported.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
    del model.graph.metadata_props[:], model.metadata_props[:]
    model.metadata_props.add(key=SPEC_KEY, value=described.to_json())
    model.producer_name = "parkdet"
    model.producer_version = ""
    model.graph.doc_string = model.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own log lines and deprecation warnings say nothing to our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
