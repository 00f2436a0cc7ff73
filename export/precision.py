"""FP16 done in the graph: the body in half precision, all that boxes are computed from in float32.

TensorRT 11 has no flag for FP16, so the types must be in the ONNX file; one such file serves TensorRT 10, 11 and RTX.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from parkdet.runtime.errors import GateError
from parkdet.runtime.model_spec import ModelSpec

if TYPE_CHECKING:
    import onnx

HALF_MAX = 65504.0
"""The largest finite float16."""
FIRST_WEIGHT = "network.model.0.conv.weight"
"""The first convolution's weight in an exported graph."""
LOSSY = 0.01
"""A tensor that loses this share of its norm to rounding is named: most of it is below float16's normal numbers."""


def in_half(graph: onnx.ModelProto, head_weights: Iterable[str]) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of a float32 graph whose body is float16, and what the user should know of its weights.

    The body goes from the convolutions that read FIRST_WEIGHT (one a view) to the raw heads, which are the
    transposed outputs of the convolutions that read `head_weights`. What stands before (scaling, the views) and behind
    (decoding) stays float32; raw heads that are the graph's outputs become float16.
    GateError names the weights that float16 cannot hold.
    """
    import onnx

    half = _without_weights(graph)
    body, entries, ends = _body(half, FIRST_WEIGHT, set(head_weights))
    of_body = {name for node in body if node.op_type == "Conv" for name in node.input[1:]}
    findings = _add_weights(half, graph.graph.initializer, of_body)
    outputs = {output.name: output for output in half.graph.output}
    casts_in = {name: f"{name}_half" for name in dict.fromkeys(entries)}
    casts_out: dict[str, str] = {}
    for name in ends:
        if name in outputs:
            outputs[name].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
        else:
            casts_out[name] = f"{name}_float"
    in_body = {id(node) for node in body}
    nodes: list[onnx.NodeProto] = []
    produced = {value.name for value in half.graph.input}
    waiting = dict(casts_in)

    def cast(source: str, target: str, to: int) -> onnx.NodeProto:
        return onnx.helper.make_node("Cast", [source], [target], name=f"node_{target}", to=to)

    for node in half.graph.node:
        for name in [name for name in node.input if name in waiting and name in produced]:
            nodes.append(cast(name, waiting.pop(name), onnx.TensorProto.FLOAT16))
        renamed = casts_in if id(node) in in_body else casts_out
        for position, name in enumerate(node.input):
            if name in renamed and not (id(node) in in_body and node.op_type != "Conv"):
                node.input[position] = renamed[name]
        nodes.append(node)
        produced.update(node.output)
        nodes += [cast(name, casts_out[name], onnx.TensorProto.FLOAT) for name in node.output if name in casts_out]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del half.graph.node[:]
    half.graph.node.extend(kept)
    return half, findings


def raw_head_names(model: onnx.ModelProto, head_weights: Iterable[str]) -> list[str]:
    """Tensors of a graph that are its raw heads, finest first, view by view: what its boxes are decoded from."""
    return _body(model, FIRST_WEIGHT, set(head_weights))[2]


def _body(
    model: onnx.ModelProto, first_weight: str, head_weights: set[str]
) -> tuple[list[onnx.NodeProto], list[str], list[str]]:
    """Nodes of the body, the tensors that enter it, and the raw heads that leave it."""
    inside: set[str] = set()  # tensors of the body, raw heads left out
    of_head: set[str] = set()  # tensors between a head's convolution and its transposition
    body, entries, ends = [], [], []
    for node in model.graph.node:
        starts = node.op_type == "Conv" and node.input[1] == first_weight
        if starts:
            entries.append(node.input[0])
        if not starts and not inside.intersection(node.input) and not of_head.intersection(node.input):
            continue
        if node.op_type == "Shape":
            continue  # whole numbers, whatever the body is
        body.append(node)
        if node.op_type == "Conv" and node.input[1] in head_weights:
            of_head.update(node.output)
        elif of_head.intersection(node.input):
            if node.op_type == "Transpose":
                ends += node.output
            else:
                of_head.update(node.output)
        else:
            inside.update(node.output)
    if not entries or not ends:
        raise ValueError(f"the graph has no convolution with the weight {first_weight}, or no heads behind it")
    return body, entries, ends


def _without_weights(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without weights, which are most of its bytes, and without value infos, which state the types of before."""
    import onnx

    copy = onnx.ModelProto(
        ir_version=graph.ir_version,
        producer_name=graph.producer_name,
        opset_import=graph.opset_import,
        metadata_props=graph.metadata_props,
    )
    copy.graph.name = graph.graph.name
    copy.graph.node.extend(graph.graph.node)
    copy.graph.input.extend(graph.graph.input)
    copy.graph.output.extend(graph.graph.output)
    return copy


def _add_weights(half: onnx.ModelProto, weights: Iterable[onnx.TensorProto], names: set[str]) -> list[str]:
    """Add weights to a graph, those of these names in float16; returns what was lost, refuses what cannot be held."""
    import onnx
    from onnx import numpy_helper

    findings, out_of_range = [], []
    for tensor in weights:
        if tensor.name not in names or tensor.data_type != onnx.TensorProto.FLOAT:
            half.graph.initializer.append(tensor)
            continue
        values = numpy_helper.to_array(tensor)
        layer = tensor.name.removeprefix("network.")
        largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
        if not largest <= HALF_MAX:
            out_of_range.append(f"{layer} ({largest:.3g})")
            continue
        rounded = values.astype(np.float16)
        difference = (rounded.astype(np.float32) - values).ravel()
        norm = math.sqrt(float(np.dot(values.ravel(), values.ravel())))
        lost = math.sqrt(float(np.dot(difference, difference)))
        if lost > LOSSY * norm:
            findings.append(f"{layer} loses {lost / norm:.1%} of its norm in float16 (largest value {largest:.2g})")
        half.graph.initializer.append(numpy_helper.from_array(rounded, tensor.name))
    if out_of_range:
        raise GateError(
            f"float16 ends at {HALF_MAX:,.0f} and cannot hold {len(out_of_range)} of the weights: "
            f"{', '.join(out_of_range[:5])}{', ...' if len(out_of_range) > 5 else ''}. Export with --precision fp32"
        )
    return findings


def half_spec(spec: ModelSpec) -> ModelSpec:
    """The spec of a float32 graph after `in_half`: raw heads are float16, decoded boxes stay float32."""
    outputs = spec.outputs
    if spec.head == "raw":
        outputs = tuple(dataclasses.replace(output, dtype="float16") for output in outputs)
    return dataclasses.replace(spec, precision="fp16", outputs=outputs)
