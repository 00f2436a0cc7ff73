"""A detector small enough to be checked by hand: one convolution a level, exported as the contract says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from parkdet.runtime.geometry import FloatArray, ImageArray
from parkdet.runtime.model_spec import SPEC_KEY, ModelSpec


@dataclass(frozen=True)
class TinyModel:
    """Weights of a detector of two levels, and what it computes, in plain numpy."""

    spec: ModelSpec
    kernels: tuple[FloatArray, ...]
    """A level: (na * (5 + nc), 3, stride, stride); the convolution steps by its own size."""
    biases: tuple[FloatArray, ...]

    @classmethod
    def random(cls, seed: int = 0, **spec_fields: Any) -> TinyModel:
        rng = np.random.default_rng(seed)
        fields: dict[str, Any] = {
            "class_names": ("car", "person", "cart"),
            "category_ids": (3, 7, 8),
            "strides": (8, 16),
            "anchors": (((10, 13), (30, 20)), ((60, 50), (100, 90))),
            "imgsz": 96,
        }
        spec = ModelSpec(**{**fields, **spec_fields})
        channels = spec.anchors_per_cell * spec.num_outputs
        return cls(
            spec,
            tuple(rng.normal(0, 1.5 / s, (channels, 3, s, s)).astype(np.float32) for s in spec.strides),
            tuple(rng.normal(-0.5, 0.5, channels).astype(np.float32) for _ in spec.strides),
        )

    def heads(self, canvases: ImageArray) -> list[FloatArray]:
        """Raw heads of canvases (B, H, W, 3)."""
        heads = []
        for stride, kernel, bias in zip(self.spec.strides, self.kernels, self.biases, strict=True):
            batch, height, width, _ = canvases.shape
            patches = (canvases / 255).reshape(batch, height // stride, stride, width // stride, stride, 3)
            flat = np.einsum("bhywxc,ocyx->bohw", patches, kernel.astype(np.float64)) + bias[None, :, None, None]
            split = flat.reshape(batch, self.spec.anchors_per_cell, self.spec.num_outputs, *flat.shape[2:])
            heads.append(split.transpose(0, 1, 3, 4, 2).astype(np.float32))
        return heads

    def save(
        self, path: Path, *, fixed: tuple[int, int, int] | None = None, spec: bool = True, float_input: bool = False
    ) -> Path:
        """Write the ONNX file, its batch, height and width dynamic or `fixed`."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        na, no = self.spec.anchors_per_cell, self.spec.num_outputs
        nodes = [
            helper.make_node("Cast", ["images"], ["as_float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["as_float"], ["nchw"], perm=[0, 3, 1, 2]),
            helper.make_node("Mul", ["nchw", "scale"], ["scaled"]),
        ]
        constants = [numpy_helper.from_array(np.array([1 / 255], np.float32), "scale")]
        outputs = []
        for level, stride in enumerate(self.spec.strides):
            constants += [
                numpy_helper.from_array(self.kernels[level], f"w{level}"),
                numpy_helper.from_array(self.biases[level], f"b{level}"),
                numpy_helper.from_array(np.array([na, no], np.int64), f"split{level}"),
            ]
            nodes += [
                helper.make_node(
                    "Conv", ["scaled", f"w{level}", f"b{level}"], [f"conv{level}"],
                    strides=[stride] * 2, kernel_shape=[stride] * 2,
                ),
                helper.make_node("Shape", [f"conv{level}"], [f"batch{level}"], start=0, end=1),
                helper.make_node("Shape", [f"conv{level}"], [f"grid{level}"], start=2, end=4),
                helper.make_node(
                    "Concat", [f"batch{level}", f"split{level}", f"grid{level}"], [f"shape{level}"], axis=0
                ),
                helper.make_node("Reshape", [f"conv{level}", f"shape{level}"], [f"cells{level}"]),
                helper.make_node("Transpose", [f"cells{level}"], [f"head{level}"], perm=[0, 1, 3, 4, 2]),
            ]  # fmt: skip
            b, h, w = fixed or ("B", "H", "W")
            grid = [s // stride if isinstance(s, int) else f"{s}{level}" for s in (h, w)]
            outputs.append(helper.make_tensor_value_info(f"head{level}", TensorProto.FLOAT, [b, na, *grid, no]))
        dtype = TensorProto.FLOAT if float_input else TensorProto.UINT8
        image = helper.make_tensor_value_info("images", dtype, [*(fixed or ("B", "H", "W")), 3])
        model = helper.make_model(
            helper.make_graph(nodes, "tiny", [image], outputs, constants),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=9,
        )
        if spec:
            helper.set_model_props(model, {SPEC_KEY: self.spec.to_json(), "note": "x"})
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
        return path


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    return TinyModel.random()


@pytest.fixture(scope="session")
def tiny_onnx(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny detector as an ONNX file with dynamic batch, height and width."""
    return tiny_model.save(tmp_path_factory.mktemp("tiny") / "tiny.onnx")


@pytest.fixture(scope="session")
def random_tiny_model() -> Callable[..., TinyModel]:
    """Makes other tiny detectors."""
    return TinyModel.random


@pytest.fixture(scope="session")
def picture() -> Callable[..., ImageArray]:
    """Makes images (h, w, 3) with structure: coloured blocks and noise."""

    def make(height: int, width: int, seed: int = 0) -> ImageArray:
        rng = np.random.default_rng(seed)
        blocks = rng.integers(0, 256, (max(height // 12, 1), max(width // 12, 1), 3), dtype=np.uint8)
        image = cv2.resize(blocks, (width, height), interpolation=cv2.INTER_NEAREST).astype(np.int16)
        noisy: ImageArray = np.clip(image + rng.integers(-20, 20, image.shape), 0, 255).astype(np.uint8)
        return noisy

    return make
