"""The plugin compiled for the CPU: its core behind a C interface, and the whole library with a host for it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from parkdet.runtime.heads import RawHead
from tests.gpu_free.kernels.simulation import (
    KERNELS,
    build_folder,
    compiled,
    kernel_flags,
    kernel_sources,
    scheduler_object,
)

HERE = Path(__file__).parent
PLUGIN = KERNELS / "plugin"
FLOAT32, INT32 = 1, 5
"""nvinfer1::PluginFieldType."""


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """The attributes of a ParkdetNMS node, as `parkdet export --head plugin` writes them."""

    strides: Sequence[int]
    anchors: Sequence[float]
    num_classes: int
    conf: float = 0.01
    iou: float = 0.7
    max_det: int = 50
    max_candidates: int = 30000
    multi_label: int = 1
    agnostic: int = 0
    view_scales: Sequence[float] = ()
    view_flips: Sequence[int] = ()
    others: Mapping[str, Any] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Name -> int32 or float32 values."""
        heads = len(self.strides)
        whole = {
            name: getattr(self, name)
            for name in ("max_det", "max_candidates", "multi_label", "agnostic", "num_classes")
        }
        made = {name: np.array([value], np.int32) for name, value in whole.items()}
        made |= {name: np.array([getattr(self, name)], np.float32) for name in ("conf", "iou")}
        made["strides"] = np.array(self.strides, np.int32)
        made["anchors"] = np.array(self.anchors, np.float32)
        made["view_scales"] = np.array(self.view_scales or [1.0] * heads, np.float32)
        made["view_flips"] = np.array(self.view_flips or [0] * heads, np.int32)
        return made | {name: np.asarray(value) for name, value in self.others.items()}


def shared_core() -> Path:
    """NmsCore and its launches on the CPU, without TensorRT."""
    sources = [HERE / "core_interface.cpp", PLUGIN / "nms_core.cpp", launches_object(), scheduler_object()]
    return compiled(sources, [*kernel_flags(), "-fvisibility=hidden", "-shared"], _dependencies(), ".so")


def launches_object() -> Path:
    """launch.cu with its launches in words that g++ knows: those of cuda_launches.h."""
    cuda = PLUGIN / "launch.cu"
    text, launches = re.subn(r"(\w+)<<<([^<>]*)>>>\(", r"launched(\1, \2)(", cuda.read_text())
    assert launches, f"{cuda} launches nothing"
    text = f'#include "cuda_launches.h"\n#line 1 {json.dumps(str(cuda))}\n{text}'
    source = build_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.cpp"
    partial = source.with_name(f"{os.getpid()}-{source.name}")
    partial.write_text(text)
    partial.replace(source)
    return compiled([source], [*kernel_flags(), "-Werror", f"-I{PLUGIN}", "-c"], _dependencies(), ".o")


def _dependencies() -> list[Path]:
    return [*kernel_sources(), *PLUGIN.glob("*.h"), *PLUGIN.glob("*.cpp")]


def tensorrt_headers() -> Path | None:
    """TENSORRT_INCLUDE_DIR, where it holds TensorRT's headers."""
    folder = os.environ.get("TENSORRT_INCLUDE_DIR")
    return Path(folder) if folder and (Path(folder) / "NvInferRuntime.h").is_file() else None


def cuda_headers() -> Path | None:
    """CUDA's own headers, which TensorRT's include."""
    wheels = importlib.util.find_spec("nvidia")
    places = (wheels and wheels.submodule_search_locations) or ()
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    candidates = [home / "include", *(Path(place) / "cu13/include" for place in places)]
    return next((folder for folder in candidates if (folder / "cuda_runtime_api.h").is_file()), None)


def plugin_library(tensorrt: Path, cuda: Path) -> Path:
    """The plugin as a host loads it, its kernels compiled for the CPU."""
    sources = [PLUGIN / "nms_plugin.cpp", PLUGIN / "entry.cpp", PLUGIN / "nms_core.cpp"]
    sources += [launches_object(), scheduler_object()]
    system = ["-isystem", str(tensorrt), "-isystem", str(cuda)]
    flags = [*kernel_flags(), "-Werror", "-fvisibility=hidden", "-shared", *system]
    return compiled(sources, flags, [*_dependencies(), tensorrt / "NvInferVersion.h"], ".so")


def host_library(tensorrt: Path, cuda: Path) -> Path:
    """The host of `host.cpp`."""
    flags = ["-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-isystem", str(tensorrt), "-isystem", str(cuda)]
    return compiled([HERE / "host.cpp"], flags, [tensorrt / "NvInferVersion.h"], ".so")


def registry_library(tensorrt: Path, cuda: Path) -> Path:
    """A libnvinfer.so.N with nothing but a plugin registry, in a folder of its own."""
    version = (tensorrt / "NvInferVersion.h").read_text()
    major = re.search(r"define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) (\d+)", version)
    assert major is not None
    flags = ["-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-isystem", str(tensorrt), "-isystem", str(cuda)]
    made = compiled([HERE / "registry.cpp"], flags, [tensorrt / "NvInferVersion.h"], ".so")
    folder = made.with_suffix("")
    folder.mkdir(exist_ok=True)
    library = folder / f"libnvinfer.so.{major[1]}"
    if not library.exists():
        library.symlink_to(made)
    return library


def outputs_of(batch: int, max_det: int) -> list[np.ndarray[Any, Any]]:
    """num_dets, boxes, scores and classes, full of rubbish. Boxes are aligned as on a device."""
    shapes: list[tuple[tuple[int, ...], Any]] = [
        ((batch, 1), np.int32), ((batch, max_det, 4), np.float32),
        ((batch, max_det), np.float32), ((batch, max_det), np.int32),
    ]  # fmt: skip
    made = []
    for shape, dtype in shapes:
        memory = np.full(4 * int(np.prod(shape)) + 256, 0xCD, np.uint8)
        start = -memory.ctypes.data % 256
        made.append(memory[start : start + 4 * int(np.prod(shape))].view(dtype).reshape(shape))
    return made


def dims_of(heads: Sequence[RawHead]) -> np.ndarray[Any, Any]:
    """Five numbers a head."""
    return np.array([head.shape for head in heads], np.int64)
