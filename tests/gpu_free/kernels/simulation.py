"""The kernels compiled for the CPU: built with g++ from the sources that nvcc compiles, and launched from Python."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.cuda.kernels import (
    HeadGeometry,
    Launch,
    OutputLayout,
    bind_workspace,
    letterbox_launch,
    nms_launches,
    nms_parameters,
    workspace_bytes,
)
from parkdet.runtime.detections import Detections
from parkdet.runtime.geometry import ImageArray, Letterbox
from parkdet.runtime.heads import RawHead
from parkdet.runtime.nms import MAX_CANDIDATES, NmsCounts, NmsSettings

ROOT = Path(__file__).resolve().parents[3]
SHIM = ROOT / "tests/gpu_free/shim"
KERNELS = ROOT / "runtime/cuda"
HERE = ROOT / "tests/gpu_free/kernels"

# Without contraction, as nvcc is told: aarch64 compilers fuse unasked.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
SANITIZERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "": ((), ()),
    "address": (
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fsanitize-sections=simt_shared", "-g"),
        ("-DSIMT_ASAN",),
    ),
    "thread": (("-fsanitize=thread", "-g"), ("-DSIMT_TSAN",)),
}
"""Name -> what the kernels are compiled with, and what the scheduler is, which must not be instrumented."""


class CompileError(Exception):
    """g++ refused."""


def compiler() -> str | None:
    """The C++ compiler, where there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _run(arguments: Sequence[str | Path]) -> None:
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(done.stderr)


@functools.cache
def build_folder() -> Path:
    """Where builds are kept, by the hash of what they are made of."""
    folder = Path(tempfile.gettempdir()) / f"parkdet-simulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def compiled(sources: Sequence[Path], flags: Sequence[str], dependencies: Sequence[Path], suffix: str) -> Path:
    """The result of one call of g++, from the build folder if it was made before."""
    gxx = compiler()
    if gxx is None:
        raise CompileError("there is no g++ (or what CXX names)")
    digest = hashlib.sha256(repr([gxx, *flags, *map(str, sources)]).encode())
    for path in sorted({*sources, *dependencies}):
        digest.update(path.read_bytes())
    target = build_folder() / f"{digest.hexdigest()[:24]}{suffix}"
    if not target.exists():
        partial = target.with_name(f"{os.getpid()}-{target.name}")
        _run([gxx, *flags, "-o", partial, *sources])
        partial.replace(target)
    return target


def scheduler_object(sanitizer: str = "") -> Path:
    """The scheduler, compiled once for every simulation of this kind."""
    _, macros = SANITIZERS[sanitizer]
    return compiled([SHIM / "simt.cpp"], [*FLAGS, *macros, "-c"], list(SHIM.iterdir()), ".o")


def kernel_flags(kernels: Path = KERNELS, sanitizer: str = "") -> list[str]:
    """What a file that includes the kernels of this folder is compiled with."""
    return [*FLAGS, *SANITIZERS[sanitizer][0], f"-I{SHIM}", f"-I{kernels}"]


def kernel_sources(kernels: Path = KERNELS) -> list[Path]:
    return [*kernels.glob("*.h"), *kernels.glob("*.cuh"), *SHIM.iterdir()]


def case_runner(kernels: Path = KERNELS, sanitizer: str = "") -> Path:
    """run_cases.cpp, with the kernels of this folder. What does not depend on them is compiled once."""
    # A mutant runs for less time than the optimizer would take.
    instrumented = [*SANITIZERS[sanitizer][0], *([] if sanitizer else ["-O0"])]
    flags = [*FLAGS, *instrumented, f"-I{SHIM}", f"-I{KERNELS}", "-c"]
    host = compiled([HERE / "run_cases.cpp"], flags, kernel_sources(), ".o")
    header = SHIM / "cuda_fp16.h"
    precompiled = compiled([header], [*FLAGS, *instrumented, "-xc++-header"], list(SHIM.iterdir()), ".gch")
    # g++ takes a precompiled header that lies beside the header in the folder where it looks first.
    folder = precompiled.with_suffix("")
    folder.mkdir(exist_ok=True)
    for source, name in ((header, header.name), (precompiled, f"{header.name}.gch")):
        if not (folder / name).exists():
            partial = folder / f"{os.getpid()}-{name}"
            shutil.copy(source, partial)
            partial.replace(folder / name)
    flags = [*FLAGS, *instrumented, f"-I{folder}", f"-I{SHIM}", f"-I{kernels}"]
    sources = [HERE / "device_code.cpp", host, scheduler_object(sanitizer)]
    return compiled(sources, flags, kernel_sources(kernels), "")


def run_cases(runner: Path, cases: Path, seconds: int) -> str:
    """What went wrong with the cases of a file, or nothing."""
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [runner, cases, str(seconds)], capture_output=True, text=True, errors="replace", check=False, env=environment
    )
    if done.returncode == 0:
        return ""
    if done.returncode == -signal.SIGXCPU:
        return "hangs"
    words = done.stdout + "\n".join(re.findall(r"^SUMMARY: .*|.*runtime error: .*", done.stderr, re.MULTILINE))
    return words.strip() or f"ended with {done.returncode}: {done.stderr[-500:]}"


def kernel_library() -> Path:
    """The kernels as a shared library for a process of this machine."""
    sources = [HERE / "simulate.cpp", scheduler_object()]
    return compiled(sources, [*kernel_flags(), "-shared"], kernel_sources(), ".so")


@dataclass(frozen=True, slots=True)
class Simulation:
    """The kernels as a library of this process."""

    library: ctypes.CDLL

    @classmethod
    def build(cls) -> Simulation:
        library = ctypes.CDLL(str(kernel_library()))
        library.simulate_launch.restype = ctypes.c_char_p
        library.simulated_parameter_bytes.restype = ctypes.c_size_t
        library.simulated_sigmoid.restype = ctypes.c_float
        library.simulated_half.restype = ctypes.c_float
        return cls(library)

    def launch(self, launch: Launch, schedule: int = 0) -> None:
        """Run one kernel to its end; RuntimeError says what went wrong. The addresses are this process's memory."""
        size = self.library.simulated_parameter_bytes(launch.entry.encode())
        assert size == ctypes.sizeof(launch.parameters), f"{launch.entry} takes {size} bytes"
        problem = self.library.simulate_launch(
            launch.entry.encode(),
            (ctypes.c_uint * 3)(*launch.grid),
            (ctypes.c_uint * 3)(*launch.block),
            ctypes.byref(launch.parameters),
            ctypes.c_uint(schedule),
        )
        if problem:
            raise RuntimeError(f"{launch.entry}: {problem.decode()}")

    def nms(
        self,
        heads: Sequence[RawHead],
        geometries: Sequence[HeadGeometry],
        settings: NmsSettings,
        *,
        max_candidates: int = MAX_CANDIDATES,
        schedule: int = 0,
        images: int | None = None,
    ) -> list[tuple[Detections, NmsCounts]]:
        """Post-process raw heads (B, na, h, w, 5 + nc), the first `images` of them, from memory full of rubbish."""
        parameters = nms_parameters(
            geometries,
            heads[0].shape[-1] - 5,
            settings,
            half_heads=heads[0].dtype == np.float16,
            max_candidates=max_candidates,
        )
        parameters.batch = heads[0].shape[0] if images is None else images
        contiguous = [np.ascontiguousarray(head) for head in heads]
        for index, head in enumerate(contiguous):
            parameters.heads[index].raw = head.ctypes.data
        workspace = _aligned_rubbish(workspace_bytes(parameters.batch, max_candidates))
        bind_workspace(parameters, workspace.ctypes.data)
        layout = OutputLayout(parameters.batch, settings.max_det)
        output = _aligned_rubbish(layout.nbytes)
        layout.bind(parameters, output.ctypes.data)
        for launch in nms_launches(parameters):
            self.launch(launch, schedule)
        return layout.read(output, parameters.batch, max_candidates)

    def letterbox(self, letterbox: Letterbox, image: ImageArray, schedule: int = 0) -> ImageArray:
        """The canvas of an image, whose rows may lie apart."""
        canvas = np.full((*letterbox.canvas_hw, 3), 7, np.uint8)
        self.launch(letterbox_launch(letterbox, image.ctypes.data, canvas.ctypes.data, image.strides[0]), schedule)
        return canvas


def _aligned_rubbish(size: int) -> NDArray[np.uint8]:
    memory = np.full(size + 256, 0xCD, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + size]
