"""Engines, pictures and the CPU's answers, for the tests of the TensorRT backend on the simulated driver."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from parkdet.runtime import engine_sidecar
from parkdet.runtime.engine_sidecar import EngineSidecar, ShapeRange
from parkdet.runtime.geometry import ImageArray, Letterbox
from parkdet.runtime.heads import RawHead, decode_candidates
from parkdet.runtime.model_spec import ModelSpec, TensorSpec
from parkdet.runtime.nms import NmsSettings, suppress
from parkdet.runtime.views import head_sources
from tests.gpu_free.driver.simulated.tensorrt_double import VERSIONS, simulated_engine
from tests.runtime.conftest import TinyModel

CANVAS = (80, 112)
NMS = NmsSettings(conf=0.2, iou=0.5, max_det=20)
Found = list[Any]


def make_engine(
    path: Path, model: TinyModel, flavour: str = "11", canvas: tuple[int, int] = CANVAS,
    batches: tuple[int, int] = (1, 4), half: bool = True, canvases: tuple[tuple[int, int], ...] = (), **changed: Any,
) -> Path:  # fmt: skip
    """An engine and its sidecar, as `parkdet export` would leave them."""
    least, most = batches
    onnx = path.with_suffix(".onnx")
    model.save(onnx, fixed=None if canvases else ("B", *canvas))  # type: ignore[arg-type]
    simulated_engine(path, onnx, least, most, half, canvases)
    about = {"flavour": "tensorrt-rtx" if flavour == "rtx" else "tensorrt", "version": VERSIONS[flavour]}
    describe_engine(path, model, canvas, batches, half, **(about | changed))
    return path


def engine_spec(model: TinyModel, canvas: tuple[int, int] = CANVAS, half: bool = True) -> ModelSpec:
    """The spec of an engine of the tiny model for one canvas, of any batch."""
    outputs = tuple(
        TensorSpec(
            name=f"head{level}",
            dtype="float16" if half else "float32",
            shape=(-1, 2, canvas[0] // s, canvas[1] // s, 8),
        )
        for level, s in enumerate(model.spec.strides)
    )
    return replace(
        model.spec,
        precision="fp16" if half else "fp32",
        inputs=(TensorSpec(name="images", dtype="uint8", shape=(-1, *canvas, 3)),),
        outputs=outputs,
    )


def describe_engine(
    path: Path, model: TinyModel, canvas: tuple[int, int] = CANVAS, batches: tuple[int, int] = (1, 4),
    half: bool = True, **changed: Any,
) -> None:  # fmt: skip
    """Write the sidecar of an engine of the tiny model."""
    least, most = batches
    content = path.read_bytes()
    sidecar = EngineSidecar(
        spec=engine_spec(model, canvas, half),
        flavour="tensorrt",
        version="",
        architectures=(75,),
        batch=ShapeRange(low=least, best=most, high=most),
        canvas_height=ShapeRange.fixed(canvas[0]),
        canvas_width=ShapeRange.fixed(canvas[1]),
        graph_sha256="0" * 64,
        engine_sha256=hashlib.sha256(content).hexdigest(),
        engine_bytes=len(content),
        build_seconds=1.0,
    )
    engine_sidecar.write(path, replace(sidecar, **changed))


def picture(height: int, width: int, seed: int) -> ImageArray:
    """Blocks of colour with noise."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    image = np.repeat(np.repeat(blocks, 8, 0), 8, 1)[:height, :width].astype(np.int16)
    noisy: ImageArray = np.clip(image + rng.integers(-20, 20, image.shape), 0, 255).astype(np.uint8)
    return noisy


def batch_of(count: int, seed: int) -> tuple[list[ImageArray], list[Letterbox]]:
    """Images of several sizes whose letterboxes are onto one canvas; those of 96 pixels are not scaled."""
    sizes = [(64, 96), (60, 96), (128, 192), (32, 48)]
    images = [picture(*sizes[(seed + i) % len(sizes)], seed=100 * seed + i) for i in range(count)]
    return images, [Letterbox.fit((image.shape[0], image.shape[1]), 96, 16, CANVAS) for image in images]


def on_the_cpu(
    model: TinyModel, images: list[ImageArray], letterboxes: list[Letterbox], nms: NmsSettings, half: bool = True
) -> Found:
    """The specification: OpenCV's letterbox, the network in numpy, heads rounded as the engine's are, numpy's NMS."""
    canvases = np.stack([box.apply(image) for box, image in zip(letterboxes, images, strict=True)])
    heads: list[RawHead] = [head.astype(np.float16 if half else np.float32) for head in model.heads(canvases)]
    return [suppress(one, nms) for one in decode_candidates(heads, model.spec, nms.conf)]


def same(found: Found, expected: Found, exact: bool = True) -> bool:
    """Equal detections and counts: to the bit, or as far as sums of another order go."""
    close: Callable[..., bool] = np.array_equal if exact else lambda a, b: np.allclose(a, b, atol=2e-3, rtol=1e-3)
    return len(found) == len(expected) and all(
        np.array_equal(a.class_ids, b.class_ids)
        and close(a.xyxy, b.xyxy)
        and close(a.scores, b.scores)
        and counts == other
        for (a, counts), (b, other) in zip(found, expected, strict=True)
    )


def views_onnx(path: Path, spec: ModelSpec, canvas: tuple[int, int] = CANVAS) -> list[TensorSpec]:
    """An ONNX file that gives a head of the right shape for each view and level of test-time augmentation.

    The numbers are of no detector: the canvas is resized to the head's cells, and each cell's colour mixed at random.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng, channels = np.random.default_rng(2), spec.anchors_per_cell * spec.num_outputs
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
    ]
    constants, outputs = [], []
    for source in head_sources(len(spec.strides), tta=True):
        name, stride = source.name, spec.strides[source.level]
        rows, columns = (source.view.padded(side, spec.stride_max) // stride for side in canvas)
        shape = (1, spec.anchors_per_cell, rows, columns, spec.num_outputs)
        kernel = rng.normal(0, 1 / 60, (channels, 3, 1, 1)).astype(np.float32)
        for suffix, value in (
            ("sizes", np.array([1, 3, rows, columns], np.int64)), ("w", kernel),
            ("cells", np.array([1, spec.anchors_per_cell, spec.num_outputs, rows, columns], np.int64)),
        ):  # fmt: skip
            constants.append(numpy_helper.from_array(value, f"{name}_{suffix}"))
        nodes += [
            helper.make_node("Resize", ["nchw", "", "", f"{name}_sizes"], [f"{name}_small"], mode="nearest"),
            helper.make_node("Conv", [f"{name}_small", f"{name}_w"], [f"{name}_mixed"]),
            helper.make_node("Reshape", [f"{name}_mixed", f"{name}_cells"], [f"{name}_split"]),
            helper.make_node("Transpose", [f"{name}_split"], [name], perm=[0, 1, 3, 4, 2]),
        ]
        outputs.append(TensorSpec(name=name, dtype="float16", shape=shape))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [1, *canvas, 3])
    infos = [helper.make_tensor_value_info(one.name, TensorProto.FLOAT, one.shape) for one in outputs]
    graph = helper.make_graph(nodes, "views", [images], infos, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return outputs
