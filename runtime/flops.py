"""How far a model is from the device's limit: its operations counted from the graph, the matrix peak measured.

Both by OpenVINO, which reads every graph that the runtime does and is there where CPU inference is installed.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parkdet.runtime.backends.openvino import process_core

if TYPE_CHECKING:
    import openvino

_SIDE = 64
_CHANNELS = 1024
"""A 1 x 1 convolution of so many channels on 64 x 64 pixels: 8.6 GFLOP, as large as a network's largest."""


def count_flops(path: Path, shape: tuple[int, int, int]) -> int:
    """Floating point operations of one run on (batch, height, width): two for each multiply-add of the
    convolutions and matrix products, which are all but a hundredth of such a network.

    `path`: an .onnx or OpenVINO .xml file. RuntimeError, as OpenVINO's, where it cannot be read.
    """
    model = process_core().read_model(path)
    model.reshape({model.input(0): [*shape, 3]})
    return sum(_flops(op) for op in model.get_ordered_ops())


def _flops(op: openvino.Node) -> int:
    kind = op.get_type_name()
    if kind == "Convolution":  # weights (out, in, kh, kw)
        per_output = math.prod(op.input_value(1).get_shape()[1:])
    elif kind == "GroupConvolution":  # weights (groups, out, in, kh, kw)
        per_output = math.prod(op.input_value(1).get_shape()[2:])
    elif kind == "MatMul":
        per_output = op.input_value(0).get_shape()[-2 if op.get_attributes().get("transpose_a") else -1]
    else:
        return 0
    return int(2 * per_output * math.prod(op.output(0).get_shape()))


def matrix_peak(precision: str, threads: int, seconds: float = 2.0) -> float:
    """Floating point operations a second of this processor in a large convolution, the best of many runs.

    `precision`: fp32, bf16, or int8 with anything after it.
    """
    model = _one_convolution(int8=precision.startswith("int8"))
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision.endswith("bf16") else "f32",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
    }
    request = process_core().compile_model(model, "CPU", settings).create_infer_request()
    image = np.random.default_rng(0).normal(0, 1, (1, _CHANNELS, _SIDE, _SIDE)).astype(np.float32)
    request.infer([image])
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        request.infer()
        best = min(best, time.perf_counter() - started)
    return 2 * _CHANNELS * _CHANNELS * _SIDE * _SIDE * _REPEATS / best


_REPEATS = 4
"""Convolutions in a row: what goes in and out once does not count."""


def _one_convolution(int8: bool) -> openvino.Model:
    import openvino as ov
    import openvino.opset13 as ops

    image = ops.parameter([1, _CHANNELS, _SIDE, _SIDE], np.float32)
    node = image
    rng = np.random.default_rng(1)
    for _ in range(_REPEATS):
        weights = ops.constant(rng.normal(0, 0.03, (_CHANNELS, _CHANNELS, 1, 1)).astype(np.float32))
        if int8:
            low, high = np.float32(-4), np.float32(4)
            node = ops.fake_quantize(node, low, high, low, high, 256)
            low, high = np.float32(-0.127), np.float32(0.127)
            weights = ops.fake_quantize(weights, low, high, low, high, 255)
        node = ops.convolution(node, weights, [1, 1], [0, 0], [0, 0], [1, 1])
    return ov.Model([node], [image], "matrix peak")
