"""Engines of a graph: one file a target that needs its own, each with its sidecar."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parkdet.export.tensorrt_build import BuildSettings, Built, Say, build_engine
from parkdet.runtime import engine_sidecar
from parkdet.runtime.engine_sidecar import EngineSidecar, Flavour, architecture_of
from parkdet.runtime.errors import ParkdetError, UsageError
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.shards import write_atomically

OWN_ENGINE = frozenset({75})
"""Architectures that share no engine with others: Turing's kernels are compiled apart."""
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 103, 110, 120, 121)
"""Compute capabilities from Turing on."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What an engine is built on, where TensorRT builds on a GPU."""

    name: str
    architecture: int


def rtx_architectures(trt: Any) -> tuple[int, ...]:
    """What the installed TensorRT for RTX builds for."""
    names = trt.ComputeCapability.__members__
    return tuple(sorted(int(name[2:]) for name in names if name.startswith("SM")))


def targets(flavour: Flavour, asked: Sequence[int], trt: Any) -> list[tuple[int, ...]]:
    """The architectures of each engine file. UsageError for one that the flavour does not serve.

    TensorRT builds for the GPU that is here; `asked` may only be that one, which `local_gpu` checks.
    """
    wanted = sorted(set(asked))
    if flavour == "tensorrt":
        if len(wanted) > 1:
            raise UsageError(
                "--engine tensorrt builds for the GPU that is here, one architecture; --hardware ampere-plus makes an "
                "engine for all newer ones"
            )
        return [tuple(wanted)]
    served = rtx_architectures(trt)
    if not wanted:
        raise UsageError(f"--engine tensorrt-rtx builds for named targets: --arch {','.join(map(str, served))}")
    for architecture in wanted:
        if architecture not in served:
            known = architecture in ARCHITECTURES
            remedy = "; build on such a GPU with --engine tensorrt" if known else ""
            raise UsageError(
                f"--arch {architecture}: TensorRT for RTX {trt.__version__} builds for "
                f"{', '.join(map(str, served))}, not for {architecture}{remedy}"
            )
    alone = [(architecture,) for architecture in wanted if architecture in OWN_ENGINE]
    shared = tuple(architecture for architecture in wanted if architecture not in OWN_ENGINE)
    return [*alone, *([shared] if shared else [])]


def engine_name(stem: str, architectures: Sequence[int]) -> str:
    """`best.sm86.engine`, or `best.sm80-120.engine` where several share it."""
    low, high = min(architectures), max(architectures)
    return f"{stem}.sm{low}{'' if low == high else f'-{high}'}.engine"


def local_gpu(asked: Sequence[int]) -> Gpu:
    """The GPU that is here. UsageError where there is none, or where another architecture is asked for."""
    from parkdet.runtime.cuda.driver import Device

    try:
        with Device() as device:
            found = Gpu(device.name, architecture_of(*device.capability))
    except ParkdetError as error:
        raise UsageError(
            f"--engine tensorrt builds on the GPU that the engine is for, and none can be used here ({error}). Without "
            "a GPU: --engine tensorrt-rtx --arch 75,86,89,120"
        ) from error
    if asked and tuple(asked) != (found.architecture,):
        raise UsageError(
            f"--arch {asked[0]}: --engine tensorrt builds for the GPU that is here, {found.name} with "
            f"{found.architecture}"
        )
    return found


def timing_cache_path(folder: Path, gpu: Gpu, version: str, graph_sha256: str) -> Path:
    """Where timings of one GPU, TensorRT version and graph are kept: of another one they would be wrong or refused."""
    key = hashlib.sha256(f"{gpu.name}\0{gpu.architecture}\0{version}\0{graph_sha256}".encode()).hexdigest()
    return folder / f"sm{gpu.architecture}-{version}-{key[:16]}.timing"


def default_timing_folder() -> Path:
    """The user's cache folder, as the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parkdet" / "timings"


@dataclass(frozen=True, slots=True, eq=False)
class EngineJob:
    """One engine to build: the graph, what for, and where it goes."""

    graph: bytes
    graph_name: str
    spec: ModelSpec
    """The graph's."""
    settings: BuildSettings
    gpu: Gpu | None = None
    timing_folder: Path | None = None

    def build(self, trt: Any, say: Say) -> tuple[Built, EngineSidecar]:
        """The engine and its sidecar, nothing written but the timing cache."""
        graph_sha256 = hashlib.sha256(self.graph).hexdigest()
        cache = None
        if self.gpu is not None and self.timing_folder is not None:
            cache = timing_cache_path(self.timing_folder, self.gpu, trt.__version__, graph_sha256)
        timings = cache.read_bytes() if cache is not None and cache.is_file() else b""
        built = build_engine(trt, self.graph, self.graph_name, self.spec, self.settings, say, timings)
        if cache is not None and built.timings:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, built.timings)
        settings = self.settings
        sidecar = EngineSidecar(
            spec=dataclasses.replace(self.spec, inputs=built.inputs, outputs=built.outputs),
            flavour=settings.flavour,
            version=trt.__version__,
            architectures=settings.architectures or ((self.gpu.architecture,) if self.gpu else ()),
            hardware_compatibility=settings.hardware,
            gpu=self.gpu.name if self.gpu else "",
            batch=settings.batch,
            canvas_height=settings.canvas_height,
            canvas_width=settings.canvas_width,
            graph_sha256=graph_sha256,
            engine_sha256=hashlib.sha256(built.plan).hexdigest(),
            engine_bytes=len(built.plan),
            build_seconds=round(built.seconds, 2),
            built_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        return built, sidecar


def write_engine(path: Path, built: Built, sidecar: EngineSidecar) -> None:
    """The engine and its sidecar; a sidecar never stands beside another engine than its own."""
    engine_sidecar.sidecar_path(path).unlink(missing_ok=True)
    write_atomically(path, built.plan)
    engine_sidecar.write(path, sidecar)
