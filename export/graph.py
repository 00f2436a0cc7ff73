"""Checkpoint to ONNX: canvases in, raw heads (or boxes) out, the model spec in the metadata."""

from __future__ import annotations

import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from parkdet.export.config import GraphOptions
from parkdet.export.decode import decoded_boxes
from parkdet.export.plugin_node import with_plugin
from parkdet.export.precision import half_spec, in_half
from parkdet.runtime.model_spec import SPEC_KEY, ModelSpec, TensorSpec
from parkdet.runtime.views import head_sources
from parkdet.train.model.network import Yolov5
from parkdet.train.model.tta import view_heads

if TYPE_CHECKING:
    import onnx

OPSET = 20
INPUT_NAME = "images"
DECODED_NAME = "output0"
"""What YOLOv5's own export calls it: the tools that expect decoded boxes look for this name."""


class GraphSource(nn.Module):
    """What is exported: the fused network behind the conversion from the caller's pixels."""

    def __init__(self, network: Yolov5, options: GraphOptions):
        super().__init__()
        self.options = options
        self.network = network.fused().float()
        if options.input_format == "uint8-nhwc":
            with torch.no_grad():
                # OpenCV decodes to BGR, the network was trained on RGB: reversing the weights costs nothing.
                self.network.first_conv.weight.copy_(self.network.first_conv.weight.flip(1))

    def forward(self, images: Tensor) -> list[Tensor] | Tensor:
        """Canvases as `input_format` says to raw heads, or to decoded boxes (B, N, 5 + nc)."""
        canvas = images
        if self.options.input_format == "uint8-nhwc":
            # The cast stands before the transposition: TensorRT has no uint8 transposition.
            canvas = images.float().permute(0, 3, 1, 2) / 255
        heads: list[Tensor] = view_heads(self.network, canvas) if self.options.tta else self.network(canvas)
        if self.options.head == "decoded":
            return decoded_boxes(heads, self.network.spec, self.options.tta, canvas.shape[3])
        return heads


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """An ONNX model, what it says of itself, and what its user should know."""

    model: onnx.ModelProto
    spec: ModelSpec
    findings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GraphFile:
    """A graph that was written: a large one need not lie in memory as well."""

    path: Path
    spec: ModelSpec


def build_graph(network: Yolov5, options: GraphOptions) -> Graph:
    """The graph that the options ask for. Equal networks and options give equal bytes.

    UsageError where a side of the canvas is no multiple of the largest stride; GateError where weights are beyond
    float16 and the precision is fp16.
    """
    return finished(network, float_graph(network, options), options)


def finished(network: Yolov5, graph: Graph, options: GraphOptions) -> Graph:
    """A float32 graph brought to the precision and the head that the options ask for."""
    model, spec, findings = graph.model, graph.spec, list(graph.findings)
    if options.precision == "fp16":
        model, lost = in_half(model, head_weights(network))
        spec = half_spec(spec)
        findings += lost
    if options.head == "plugin":
        model, spec = with_plugin(model, spec)
    if model is not graph.model:
        _describe(model, spec)
    return Graph(model, spec, tuple(findings))


def head_weights(network: Yolov5) -> list[str]:
    """Names in a graph of the weights of the heads' last convolutions."""
    detect = len(network.rows) - 1
    return [f"network.model.{detect}.m.{level}.weight" for level in range(len(network.spec.strides))]


def float_graph(network: Yolov5, options: GraphOptions) -> Graph:
    """The float32 graph: any canvas (multiples of the largest stride) and any batch unless they are given.

    With `head="plugin"` it ends in the raw heads. UsageError where a side of the canvas is no multiple of the stride.
    """
    spec = network.spec
    stride = spec.stride_max
    options.check(stride)
    height, width = options.canvas_hw or (4 * stride, 5 * stride)  # any size where the axes are dynamic
    batch = options.batch or 2
    uint8 = options.input_format == "uint8-nhwc"
    example = torch.zeros(batch, height, width, 3, dtype=torch.uint8) if uint8 else torch.zeros(batch, 3, height, width)
    rows_axis = 1 if uint8 else 2
    axes: dict[int, object] = {}
    if options.batch is None:
        axes[0] = torch.export.Dim("batch", min=1, max=1024)
    if options.canvas_hw is None:
        axes[rows_axis] = stride * torch.export.Dim("rows", min=1, max=1024)
        axes[rows_axis + 1] = stride * torch.export.Dim("columns", min=1, max=1024)
    described = described_spec(spec, options)
    with _quiet():
        program = torch.onnx.export(
            GraphSource(network, options).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=[tensor.name for tensor in described.outputs],
            dynamic_shapes={"images": axes} if axes else None,
        )
    assert program is not None
    model = program.model_proto
    _describe(model, described)
    return Graph(model, described)


def described_spec(spec: ModelSpec, options: GraphOptions) -> ModelSpec:
    """The spec of a float32 graph: the checkpoint's, with what the graph takes and returns (the plugin left out)."""
    batch = options.batch or -1
    canvas_hw = options.canvas_hw
    rows, columns = canvas_hw or (-1, -1)
    if options.input_format == "uint8-nhwc":
        images = TensorSpec(name=INPUT_NAME, dtype="uint8", shape=(batch, rows, columns, 3))
    else:
        images = TensorSpec(name=INPUT_NAME, dtype="float32", shape=(batch, 3, rows, columns))
    sources = head_sources(len(spec.strides), options.tta)
    grids = [
        tuple(source.view.padded(side, spec.stride_max) // spec.strides[source.level] for side in canvas_hw)
        if canvas_hw
        else (-1, -1)
        for source in sources
    ]
    outputs: tuple[TensorSpec, ...]
    if options.head == "decoded":
        boxes = sum(spec.anchors_per_cell * h * w for h, w in grids) if canvas_hw else -1
        outputs = (TensorSpec(name=DECODED_NAME, dtype="float32", shape=(batch, boxes, spec.num_outputs)),)
    else:
        outputs = tuple(
            TensorSpec(name=source.name, dtype="float32", shape=(batch, spec.anchors_per_cell, *grid, spec.num_outputs))
            for source, grid in zip(sources, grids, strict=True)
        )
    return dataclasses.replace(
        spec,
        precision="fp32",
        tta=options.tta,
        input_format=options.input_format,
        head="decoded" if options.head == "decoded" else "raw",
        inputs=(images,),
        outputs=outputs,
    )


def serialized(model: onnx.ModelProto) -> bytes:
    """The file's bytes, the same for the same model."""
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _describe(model: onnx.ModelProto, spec: ModelSpec) -> None:
    """Replace the exporter's metadata by the spec."""
    # The exporter's notes hold file names and stack traces of the machine that exported.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
    del model.graph.metadata_props[:], model.metadata_props[:]
    model.metadata_props.add(key=SPEC_KEY, value=spec.to_json())
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
