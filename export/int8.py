"""INT8 for the CPU: NNCF quantises the float32 graph for OpenVINO on the user's images; the heads stay in float."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parkdet.export.graph import GraphFile
from parkdet.export.tensorrt_build import Say
from parkdet.runtime.backends.base import GraphBackend
from parkdet.runtime.backends.openvino import process_core
from parkdet.runtime.errors import ParkdetError, UsageError
from parkdet.runtime.geometry import ImageArray
from parkdet.runtime.model_spec import SPEC_KEY, ModelSpec

if TYPE_CHECKING:
    import openvino

MODEL_NAME = "model.xml"
_SAY_EVERY = 5.0
_ROUNDS = 7
_LONGEST_MEASUREMENT = 60.0
"""Seconds after which the comparison of speeds ends with the rounds that it has, three at least."""


def require_nncf() -> None:
    """UsageError where NNCF is not installed: told before a large network is exported for it."""
    if find_spec("nncf") is None:
        raise UsageError("--precision int8 quantises with NNCF, which is not installed: pip install nncf")


def quantised(graph: GraphFile, canvases: Sequence[ImageArray], say: Say) -> tuple[openvino.Model, ModelSpec]:
    """The OpenVINO model with INT8 convolutions and its spec. UsageError where NNCF cannot be imported.

    `graph`: float32 with raw heads. The last convolution of every head, and what follows, is left in float: a step of
    INT8 there would move boxes by pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nncf
    except ImportError as error:
        raise UsageError(f"--precision int8: NNCF cannot be imported ({error}); pip install nncf") from error
    from openvino._offline_transformations import apply_moc_transformations

    model = process_core().read_model(graph.path)
    # Convolution, bias and SiLU become what NNCF knows as one block. As the frontend leaves them it would quantise
    # between them, three times as often: 1.2 times slower, and less exact.
    apply_moc_transformations(model, cf=False)
    heads = _head_operations(model)
    nncf_log = logging.getLogger("nncf")
    level = nncf_log.level
    nncf_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            quantised_model: Any = nncf.quantize(
                model,
                nncf.Dataset(_Calibration(canvases, say)),
                preset=nncf.QuantizationPreset.MIXED,  # SiLU's outputs are not symmetric
                subset_size=len(canvases),
                ignored_scope=nncf.IgnoredScope(names=heads),
            )
    finally:
        nncf_log.setLevel(level)
    spec = dataclasses.replace(graph.spec, precision="int8")
    quantised_model.set_rt_info(spec.to_json(), ["framework", SPEC_KEY])
    return quantised_model, spec


class _Calibration:
    """The canvases for NNCF, which runs the network on them one by one; `say` hears how far it is."""

    def __init__(self, canvases: Sequence[ImageArray], say: Say):
        self._canvases, self._say = canvases, say
        self._stderr = sys.stderr  # NNCF runs with another one, which nobody sees

    def __len__(self) -> int:
        return len(self._canvases)

    def __iter__(self) -> Iterator[ImageArray]:
        said = time.monotonic()
        for number, canvas in enumerate(self._canvases):
            if time.monotonic() - said >= _SAY_EVERY:
                said = time.monotonic()
                with redirect_stderr(self._stderr):
                    self._say(f"quantising: {number} of {len(self._canvases)} images")
            yield canvas[None]


def _head_operations(model: openvino.Model) -> list[str]:
    """Names of the last convolution of every head."""
    names = []
    for result in model.get_results():
        node = result.input_value(0).get_node()
        while node.get_type_name() != "Convolution":
            node = node.input_value(0).get_node()
        names.append(node.get_friendly_name())
    return sorted(set(names))


def quantised_convolutions(model: openvino.Model) -> tuple[int, int]:
    """Convolutions whose input is quantised, and all of them."""
    convolutions = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    return sum(_is_quantised(node.input_value(0).get_node()) for node in convolutions), len(convolutions)


def _is_quantised(node: openvino.Node) -> bool:
    """Whether a tensor takes 256 values: quantised, or made of such ones by moving them."""
    if node.get_type_name() in ("Concat", "MaxPool", "Interpolate"):
        sources = node.input_values() if node.get_type_name() == "Concat" else [node.input_value(0)]
        return all(_is_quantised(source.get_node()) for source in sources)
    return bool(node.get_type_name() == "FakeQuantize")


def save(model: openvino.Model, folder: Path) -> None:
    """`model.xml` and `model.bin` in a folder of their own. ParkdetError where they cannot be written."""
    import openvino as ov

    try:
        folder.mkdir(parents=True)
        ov.save_model(model, folder / MODEL_NAME, compress_to_fp16=False)
    except (OSError, RuntimeError) as error:  # the library says no more than "iostream error"
        free = shutil.disk_usage(folder.parent).free
        raise ParkdetError(
            f"{folder}: cannot be written ({error}; {free / 1e6:,.0f} MB are free); make room, and run it again"
        ) from error


@dataclass(frozen=True, slots=True)
class Speed:
    """Milliseconds an image of both, medians of turns taken in alternation."""

    int8_ms: float
    other_ms: float
    other: str
    """What it was compared with: the runtime's default for the float32 graph here."""

    @property
    def faster(self) -> bool:
        return self.int8_ms < self.other_ms

    def __str__(self) -> str:
        return f"INT8 {self.int8_ms:.1f} ms an image, {self.other} {self.other_ms:.1f} ms"


def compare_speed(
    int8: GraphBackend, other: GraphBackend, canvas: ImageArray, clock: Callable[[], float] = time.perf_counter
) -> Speed:
    """Run both in turns on one canvas (H, W, 3)."""
    batch = np.ascontiguousarray(canvas[None])
    for backend in (int8, other):
        backend.infer(batch)  # compiled on the first call
    taken: tuple[list[float], list[float]] = ([], [])
    began = clock()
    for turn in range(_ROUNDS):
        for backend, times in zip((int8, other), taken, strict=True):
            started = clock()
            backend.infer(batch)
            times.append(clock() - started)
        if clock() - began > _LONGEST_MEASUREMENT and turn >= 2:
            break
    return Speed(1000 * statistics.median(taken[0]), 1000 * statistics.median(taken[1]), other.precision)
