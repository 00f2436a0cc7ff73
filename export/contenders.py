"""What the gate holds against the checkpoint: each graph, run by what can run it here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from parkdet.export.graph import Graph, GraphFile, head_weights, serialized
from parkdet.export.matching import FLOOR, Outputs
from parkdet.export.parity import Contender, Infer
from parkdet.export.plugin_node import attribute_differences, candidates_by_attributes, without_plugin
from parkdet.export.precision import raw_head_names
from parkdet.runtime.backends.base import Precision, available_cpus, open_backend
from parkdet.runtime.geometry import FloatArray, ImageArray
from parkdet.runtime.heads import Candidates, decode_heads
from parkdet.train.model.layers import Bottleneck, Conv, Detect
from parkdet.train.model.network import Yolov5
from parkdet.train.model.tta import view_heads

if TYPE_CHECKING:
    import onnx

_WIDER = "ONNX Runtime's CPU provider may compute FP16 operators in wider types: this is not the engine's figure"
_AS_ENGINE = (
    "weights and every layer's output rounded to float16, sums in float32, as an engine computes; emulated in torch"
)


@contextmanager
def backend_contender(
    path: Path, name: str, backend: str | None, precision: Precision | None, refuses: bool = True
) -> Iterator[Contender]:
    """A graph of raw heads in the runtime's own backend, computed as asked or as the runtime would by itself."""
    with open_backend(path, backend, precision=precision) as opened:
        key = "bf16" if precision == "bf16" else opened.spec.precision
        computed = f" in {opened.precision}" if opened.precision != key or precision == "bf16" else ""
        yield Contender(f"{name} on {opened.name}{computed}", key, opened.infer, opened.spec, refuses=refuses)


def runs_in_bf16() -> bool:
    """Whether the runtime's default on this processor is bf16."""
    from parkdet.runtime.backends.openvino import default_precision

    return default_precision() == "bf16"


@contextmanager
def session_contender(network: Yolov5, graph: Graph | GraphFile, name: str) -> Iterator[Contender]:
    """Any graph in ONNX Runtime: other inputs, other heads, FP16, the plugin's inputs with its node interpreted."""
    spec = graph.spec
    wider = _WIDER if spec.precision == "fp16" else ""
    name = f"{name} on onnxruntime"
    if spec.head == "decoded":
        infer, error = _decoded_infer(network, graph)
        yield Contender(name, spec.precision, infer, spec, wider, decode_error=error)
    elif spec.head == "plugin":
        model, node = without_plugin(_model(graph))
        raw = dataclasses.replace(spec, head="raw")

        def decode(outputs: Outputs) -> list[Candidates]:
            return candidates_by_attributes(node, list(outputs), FLOOR)

        note = "; ".join(filter(None, ("the plugin's inputs, decoded by its node's attributes", wider)))
        wrong = tuple(attribute_differences(node, spec))
        yield Contender(name, spec.precision, session_infer(Graph(model, raw)), raw, note, decode=decode, faults=wrong)
    else:
        yield Contender(name, spec.precision, session_infer(graph), spec, wider)


def _model(graph: Graph | GraphFile) -> onnx.ModelProto:
    import onnx

    return graph.model if isinstance(graph, Graph) else onnx.load(graph.path)


def _decoded_infer(network: Yolov5, graph: Graph | GraphFile) -> tuple[Infer, Callable[[], float]]:
    """A graph of decoded boxes, and how far in pixels they were from its own raw heads decoded in float32.

    Boxes decoded in float16 may overlap their partners well enough on a small canvas; here they show on any.
    """
    import onnx

    tapped = onnx.ModelProto()
    tapped.CopyFrom(_model(graph))
    names = raw_head_names(tapped, head_weights(network))
    kind = onnx.TensorProto.FLOAT16 if graph.spec.precision == "fp16" else onnx.TensorProto.FLOAT
    tapped.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in names)
    spec = dataclasses.replace(network.spec, tta=graph.spec.tta)
    run = session_infer(Graph(tapped, graph.spec))
    worst = 0.0

    def infer(canvases: ImageArray) -> list[NDArray[Any]]:
        nonlocal worst
        boxes, *heads = run(canvases)
        expected = decode_heads(heads, spec)
        if boxes.shape != expected.shape:
            worst = math.inf
            return [boxes]
        far = float(np.abs(boxes[..., :4].astype(np.float32) - expected[..., :4]).max())
        worst = max(worst, math.inf if math.isnan(far) else far)
        return [boxes]

    return infer, lambda: worst


def session_infer(graph: Graph | GraphFile) -> Infer:
    """A graph in ONNX Runtime, fed as its spec says: uint8 canvases or float RGB, a fixed batch filled up."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cpus()
    source = serialized(graph.model) if isinstance(graph, Graph) else str(graph.path)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    fixed = graph.spec.inputs[0].shape[0]
    name = graph.spec.inputs[0].name

    def run(images: NDArray[Any]) -> list[NDArray[Any]]:
        return [np.asarray(output) for output in session.run(None, {name: images})]

    def infer(canvases: ImageArray) -> list[NDArray[Any]]:
        images: NDArray[Any] = canvases
        if graph.spec.input_format == "float-nchw":
            images = np.ascontiguousarray(canvases[..., ::-1].transpose(0, 3, 1, 2)).astype(np.float32) / 255
        if fixed < 1:
            return run(images)
        portions = []
        for start in range(0, len(images), fixed):
            portion = images[start : start + fixed]
            filled = np.zeros((fixed, *images.shape[1:]), images.dtype)
            filled[: len(portion)] = portion
            portions.append([output[: len(portion)] for output in run(filled)])
        return [np.concatenate(outputs) for outputs in zip(*portions, strict=True)]

    return infer


@contextmanager
def half_contender(network: Yolov5, tta: bool) -> Iterator[Contender]:
    """FP16 as a GPU computes it, emulated: what ONNX Runtime's figure cannot show."""
    spec = dataclasses.replace(network.spec, tta=tta, precision="fp16")
    infer, overflowed = half_infer(network, tta)
    yield Contender("FP16 emulated", "fp16", infer, spec, _AS_ENGINE, overflowed=lambda: overflowed)


def half_infer(network: Yolov5, tta: bool) -> tuple[Infer, list[str]]:
    """Raw heads, weights and every block's output rounded to float16, sums in float32; and where it overflowed."""
    emulated = network.fused().float()
    with torch.no_grad():
        for parameter in emulated.parameters():
            parameter.copy_(parameter.half().float())
    names = {module: name for name, module in emulated.named_modules()}
    overflowed: list[str] = []
    finite = True

    def rounded(module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        nonlocal finite
        halves = [one.half() for one in output] if isinstance(output, list) else [output.half()]
        if finite and not all(bool(torch.isfinite(one).all()) for one in halves):
            finite = False
            if names[module] not in overflowed:
                overflowed.append(names[module])
        floats = [one.float() for one in halves]
        return floats if isinstance(output, list) else floats[0]

    for module in emulated.modules():
        # A convolution, its activation and the sum behind it are one kernel of an engine: rounded once.
        if isinstance(module, Conv | Bottleneck | Detect):
            module.register_forward_hook(rounded)
    emulated.register_forward_pre_hook(lambda _module, images: (images[0].half().float(),))

    @torch.no_grad()
    def heads(canvases: ImageArray) -> list[FloatArray]:
        nonlocal finite
        finite = True
        rgb = np.ascontiguousarray(canvases[..., ::-1].transpose(0, 3, 1, 2))
        images = torch.from_numpy(rgb).float() / 255
        return [head.numpy() for head in (view_heads(emulated, images) if tta else emulated(images))]

    return heads, overflowed
