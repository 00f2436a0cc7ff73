"""`--head plugin`: our NMS as one node behind the raw heads, for TensorRT with the parkdet plugin.

The node's attributes hold all that decoding needs, so that the plugin knows nothing of the model spec.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from parkdet.runtime.heads import Candidates, RawHead, decode_candidates
from parkdet.runtime.model_spec import ModelSpec, TensorSpec
from parkdet.runtime.nms import MAX_CANDIDATES
from parkdet.runtime.views import head_sources

if TYPE_CHECKING:
    import onnx

OPERATOR, DOMAIN = "ParkdetNMS", "parkdet"


def with_plugin(graph: onnx.ModelProto, spec: ModelSpec) -> tuple[onnx.ModelProto, ModelSpec]:
    """A copy of a graph of raw heads that ends in the plugin's node, and its spec.

    Post-processing is the spec's: `conf`, `iou`, `max_det`; multi-label, class by class.
    """
    import onnx
    from onnx import TensorProto, helper

    model = onnx.ModelProto()
    model.CopyFrom(graph)
    heads = [output.name for output in model.graph.output]
    outputs_of_node = ["num_dets", "boxes", "scores", "classes"]
    node = helper.make_node(OPERATOR, heads, outputs_of_node, name="nms", domain=DOMAIN, **_attributes(spec))
    outputs = plugin_outputs(spec, spec.outputs[0].shape[0])
    first_dim = model.graph.output[0].type.tensor_type.shape.dim[0]
    batch: Any = first_dim.dim_param or first_dim.dim_value
    raw = list(model.graph.output)
    del model.graph.output[:]
    model.graph.value_info.extend(raw)  # what the heads are is still known to who cuts the node off
    types = {"int32": TensorProto.INT32, "float32": TensorProto.FLOAT}
    for output in outputs:
        model.graph.output.append(
            helper.make_tensor_value_info(output.name, types[output.dtype], [batch, *output.shape[1:]])
        )
    model.graph.node.append(node)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return model, dataclasses.replace(spec, head="plugin", outputs=outputs)


def _attributes(spec: ModelSpec) -> dict[str, Any]:
    """What the node says of the model, of its views and of post-processing."""
    sources = head_sources(len(spec.strides), spec.tta)
    return {
        "plugin_version": "1",
        "plugin_namespace": DOMAIN,
        "conf": float(spec.conf),
        "iou": float(spec.iou),
        "max_det": spec.max_det,
        "max_candidates": MAX_CANDIDATES,
        "multi_label": 1,
        "agnostic": 0,
        "num_classes": spec.num_classes,
        "strides": [spec.strides[source.level] for source in sources],
        "anchors": [float(side) for source in sources for wh in spec.anchors[source.level] for side in wh],
        "view_scales": [float(source.view.scale) for source in sources],
        "view_flips": [int(source.view.mirrored) for source in sources],
    }


def attribute_differences(node: onnx.NodeProto, spec: ModelSpec) -> list[str]:
    """Where a node says otherwise than the spec, one sentence each: thresholds and caps change no raw head."""
    import onnx

    found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    wanted = _attributes(spec)
    return [
        f"the plugin's node has {name} {_plain(found.get(name))}, the spec {_plain(wanted.get(name))}"
        for name in sorted(found.keys() | wanted.keys())
        if _plain(found.get(name)) != _plain(wanted.get(name))
    ]


def _plain(value: Any) -> Any:
    """An attribute's value as ONNX keeps it: text in bytes, numbers in float32."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, float):
        return float(np.float32(value))
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def plugin_outputs(spec: ModelSpec, batch: int) -> tuple[TensorSpec, ...]:
    """The node's outputs; batch -1 where it is dynamic."""
    return (
        TensorSpec(name="num_dets", dtype="int32", shape=(batch, 1)),
        TensorSpec(name="boxes", dtype="float32", shape=(batch, spec.max_det, 4)),
        TensorSpec(name="scores", dtype="float32", shape=(batch, spec.max_det)),
        TensorSpec(name="classes", dtype="int32", shape=(batch, spec.max_det)),
    )


def without_plugin(graph: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.NodeProto]:
    """A copy of a graph that gives the plugin node's inputs, and the node: what a CPU can run of it."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph)
    (node,) = [node for node in model.graph.node if node.op_type == OPERATOR]
    known = {value.name: value for value in model.graph.value_info}
    kept = [one for one in model.graph.node if one.op_type != OPERATOR]
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(kept)
    model.graph.output.extend(known[name] for name in node.input)
    found = onnx.NodeProto()
    found.CopyFrom(node)
    return model, found


def candidates_by_attributes(node: onnx.NodeProto, heads: list[RawHead], conf: float) -> list[Candidates]:
    """Candidates of raw heads decoded by what the node's attributes say, not by the spec: what the plugin would see.

    ValueError where the attributes contradict one another.
    """
    import onnx

    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    strides = [int(stride) for stride in attributes["strides"]]
    scales, flips = list(attributes["view_scales"]), list(attributes["view_flips"])
    anchors = np.array(attributes["anchors"], np.float32).reshape(len(strides), -1, 2)
    if not len(strides) == len(scales) == len(flips) == len(heads):
        raise ValueError(f"the node describes {len(strides)} heads and has {len(heads)}")
    width = heads[0].shape[3] * strides[0]
    found: list[list[Candidates]] = [[] for _ in range(len(heads[0]))]
    first = 0
    for position, head in enumerate(heads):
        level = ModelSpec(
            class_names=tuple(map(str, range(int(attributes["num_classes"])))),
            strides=(strides[position],),
            anchors=(tuple((float(w), float(h)) for w, h in anchors[position]),),
            imgsz=1,
        )
        for image, candidates in enumerate(decode_candidates([head], level, conf)):
            rows = candidates.decoded
            rows[:, :4] /= np.float32(scales[position])
            if flips[position]:
                rows[:, 0] = np.float32(width) - rows[:, 0]
            found[image].append(Candidates(rows, candidates.anchor_index + first))
        first += int(np.prod(head.shape[1:4]))
    return [
        Candidates(np.concatenate([p.decoded for p in of_image]), np.concatenate([p.anchor_index for p in of_image]))
        for of_image in found
    ]
