"""TensorRT engines: images go up as uint8, letterbox, network and NMS run on the GPU, few boxes come back.

Two streams: one copies a batch's images up while the other letterboxes, runs the engine and suppresses for the batch
before. An event joins them. Everything on the compute stream uses the same canvases, heads and scratch memory in
turn; what a batch needs for itself lies in a slot of a ring. From its second run on, a batch's engine, NMS and
copy down are replayed as one CUDA graph. The copy down, a few KB, is on the compute stream.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime import engine_sidecar
from parkdet.runtime.backends.base import BackendOptions, GraphBackend, check_graph
from parkdet.runtime.backends.tensorrt_engine import (
    Engine,
    ExecutionContext,
    Library,
    TensorRtError,
    TensorRtOutOfMemory,
)
from parkdet.runtime.backends.tensorrt_memory import SharedMemory, Slot, aligned
from parkdet.runtime.cuda.device_kernels import DeviceKernels
from parkdet.runtime.cuda.driver import Device, DriverError, Event, Graph, OutOfDeviceMemory, Stream, download, upload
from parkdet.runtime.cuda.kernels import (
    NmsParameters,
    OutputLayout,
    bind_workspace,
    head_geometries,
    letterbox_launch,
    nms_launches,
    nms_parameters,
    workspace_bytes,
)
from parkdet.runtime.detections import Detections
from parkdet.runtime.engine_sidecar import Flavour
from parkdet.runtime.errors import ArtifactError, UsageError
from parkdet.runtime.geometry import ImageArray, Letterbox
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.nms import NmsCounts, NmsSettings

log = logging.getLogger(__name__)

SLOTS = 2
"""Batches in flight: one is copied up while the other is computed."""
_KEPT_CONTEXTS = 4
_Answer = TypeVar("_Answer")
Found = list[tuple[Detections, NmsCounts]]


@dataclass(frozen=True, slots=True)
class DeviceImage:
    """An image that is on the device already, (h, w, 3) uint8 BGR: somebody else's memory, by its address."""

    pointer: int
    pitch: int = 0
    """Bytes from one row to the next; 0 where the rows follow one another."""


@dataclass(slots=True)
class _Prepared:
    """An engine's context for one size of batch, with addresses of an epoch of the shared memory."""

    engine: Engine
    context: ExecutionContext
    batch: int
    """Of the engine's run; the images may be fewer."""
    canvas_hw: tuple[int, int]
    heads: list[tuple[str, tuple[int, ...], np.dtype[Any], int]]
    """Of every raw head: output, shape, type, offset in the shared memory."""
    heads_bytes: int
    serial: int
    """Another one for every context, so that no graph of one that is gone is replayed."""
    epoch: int = -1
    capturable: bool = True


class TensorRtBackend(GraphBackend):
    """One engine, for a canvas or a range of them, or several of other canvases, on one GPU."""

    name = "tensorrt"
    parallel = SLOTS

    def __init__(self, path: Path, options: BackendOptions) -> None:
        """Load the engine, or every engine of a folder. UsageError without a driver, a GPU or TensorRT;
        ArtifactError for engines that this machine cannot run."""
        self._device = Device(int(options.device.partition(":")[2] or 0))
        self._resources = ExitStack()
        self._submitting = threading.Lock()
        self._prepared: dict[tuple[tuple[int, int], int], _Prepared] = {}
        self._serials = itertools.count()
        try:
            with self._device.current():
                spec = self._load(engine_files(path), self._resources)
                first = self._engines[0]
                super().__init__(path, spec, [first.input], first.outputs)
        except BaseException:
            self._release()
            raise
        self.precision = spec.precision
        self.worth_batching = max(engine.most_batch for engine in self._engines)
        fixed = [engine.canvas_hw for engine in self._engines if engine.canvas_hw is not None]
        self.canvases = tuple(sorted(fixed)) if len(fixed) == len(self._engines) else ()
        if len(self._engines) > 1:
            self.fixed_input = (None, None, None)
        self._most: dict[tuple[int, int], int] = {}
        """Batch by canvas that was found to fit the memory."""

    def _load(self, files: Sequence[Path], resources: ExitStack) -> ModelSpec:
        libraries: dict[Flavour, Library] = {}
        self._engines: list[Engine] = []
        specs: list[ModelSpec] = []
        for file in files:
            flavour = engine_sidecar.read(file).flavour
            if flavour not in libraries:
                libraries[flavour] = Library(flavour)
            library = libraries[flavour]
            architecture = engine_sidecar.architecture_of(*self._device.capability)
            spec = engine_sidecar.check(file, flavour=flavour, version=library.version, architecture=architecture).spec
            engine = resources.enter_context(Engine(library, file.read_bytes(), file))
            check_graph(file, spec, [engine.input], engine.outputs)
            engine.order_outputs([output.name for output in spec.outputs])
            specs.append(replace(spec, inputs=(), outputs=()))
            if specs[0] != specs[-1] or engine.canvas_hw in [other.canvas_hw for other in self._engines]:
                raise ArtifactError(
                    f"{file}: does not go with {files[0]}: engines that are opened together are of one model, each of "
                    "another canvas"
                )
            self._engines.append(engine)
        self._kernels = resources.enter_context(DeviceKernels())
        self._copies = resources.enter_context(Stream())
        self._compute = resources.enter_context(Stream())
        self._foreign = resources.enter_context(Event())
        self._memory = resources.enter_context(SharedMemory())
        self._slots = [resources.enter_context(Slot()) for _ in range(SLOTS)]
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)
        return spec

    # What is asked of it --------------------------------------------------------------------------------------------

    def detect(self, images: Sequence[ImageArray], letterboxes: Sequence[Letterbox], nms: NmsSettings) -> Found:
        """See `FinishingBackend.detect`. ValueError when the letterboxes are of no canvas that an engine takes."""

        def run(part: slice, slot: Slot, engine: Engine) -> Found:
            offsets, total = slot.fill(images[part])
            with self._submitting:
                upload(slot.images.pointer, slot.pinned_images.pinned, total, self._copies)
                slot.uploaded.record(self._copies)
                self._compute.wait(slot.uploaded)
                on_device = [DeviceImage(slot.images.pointer + offset) for offset in offsets]
                layout = self._enqueue(slot, engine, on_device, letterboxes[part], nms)
            slot.done.synchronize()
            return _results(slot, layout, len(on_device))

        return self._in_portions(_common_canvas(letterboxes), len(images), run)

    def detect_on_device(
        self, images: Sequence[DeviceImage], letterboxes: Sequence[Letterbox], nms: NmsSettings, stream: int
    ) -> Found:
        """As `detect`, for images that the work so far of somebody's stream puts into device memory.

        `stream` is the handle of a stream of pycuda, CuPy or torch in the device's primary context. The images may be
        overwritten once this returns.
        """

        def run(part: slice, slot: Slot, engine: Engine) -> Found:
            with self._submitting:
                self._foreign.record(Stream(stream))
                self._compute.wait(self._foreign)
                layout = self._enqueue(slot, engine, images[part], letterboxes[part], nms)
            slot.done.synchronize()
            return _results(slot, layout, len(images[part]))

        return self._in_portions(_common_canvas(letterboxes), len(images), run)

    def _run(self, images: ImageArray) -> list[NDArray[np.floating[Any]]]:
        """The raw heads of canvases: for comparisons, since far more comes back than detections."""
        canvas = (images.shape[1], images.shape[2])
        portions = self._in_portions(
            canvas, len(images), lambda part, slot, engine: [self._heads(images[part], slot, engine)]
        )
        return [np.concatenate(level) for level in zip(*portions, strict=True)]

    def _heads(self, canvases: ImageArray, slot: Slot, engine: Engine) -> list[NDArray[np.floating[Any]]]:
        _, total = slot.fill([canvases])
        with self._submitting:
            prepared = self._prepare(engine, len(canvases), (canvases.shape[1], canvases.shape[2]))
            slot.pinned_results.reserve(prepared.heads_bytes)
            upload(self._memory.canvases.pointer, slot.pinned_images.pinned, canvases.nbytes, self._compute)
            prepared.context.enqueue(self._compute)
            download(slot.pinned_results.pinned, self._memory.heads.pointer, prepared.heads_bytes, self._compute)
            slot.done.record(self._compute)
        slot.done.synchronize()
        assert total >= canvases.nbytes
        pinned = slot.pinned_results.pinned
        return [pinned.view(dtype, shape, at)[: len(canvases)].copy() for _, shape, dtype, at in prepared.heads]

    # How it is done -------------------------------------------------------------------------------------------------

    def _in_portions(
        self, canvas: tuple[int, int], count: int, run: Callable[[slice, Slot, Engine], list[_Answer]]
    ) -> list[_Answer]:
        """`run` for portions that the engine and the memory can take, each in a slot of its own."""
        if self._closed:
            raise ValueError(f"{self.path}: this {self.name} backend is closed")
        engine = self._engine_for(canvas)
        answers: list[_Answer] = []
        done = 0
        while done < count:
            size = min(self._most.get(canvas, engine.most_batch), count - done)
            try:
                with self._device.current(), self._slot() as slot:
                    answers += run(slice(done, done + size), slot, engine)
                done += size
            except (OutOfDeviceMemory, TensorRtOutOfMemory) as error:
                self._shrink(engine, canvas, max(size, engine.least_batch), error)
        return answers

    def _engine_for(self, canvas: tuple[int, int]) -> Engine:
        """The engine of this canvas alone, or one that takes it among others."""
        able = [engine for engine in self._engines if engine.takes(canvas)]
        if not able:
            built = "; ".join(f"{engine.least[1:3]} to {engine.most[1:3]}" for engine in self._engines)
            raise ArtifactError(
                f"{self.path}: was built for canvases from {built}, not {canvas}; build an engine for this one with "
                f"'parkdet export --canvas {canvas[0]}x{canvas[1]}' and open the folder of both"
            )
        return min(able, key=lambda engine: engine.canvas_hw is None)

    @contextmanager
    def _slot(self) -> Iterator[Slot]:
        """A free slot. After a failure nothing of it is in progress any more."""
        slot = self._free.get()
        try:
            yield slot
        except BaseException:
            with self._submitting:  # nobody may be recording a graph while a stream is waited for
                for stream in (self._copies, self._compute):
                    with suppress(DriverError):  # the first failure is the one to tell
                        stream.synchronize()
            raise
        finally:
            self._free.put(slot)

    def _enqueue(
        self,
        slot: Slot,
        engine: Engine,
        images: Sequence[DeviceImage],
        letterboxes: Sequence[Letterbox],
        nms: NmsSettings,
    ) -> OutputLayout:
        """Ask the compute stream for everything from the images to the results in the slot's pinned memory."""
        canvas = letterboxes[0].canvas_hw
        prepared = self._prepare(engine, len(images), canvas)
        layout = OutputLayout(len(images), nms.max_det)
        slot.results.reserve(layout.nbytes)
        slot.pinned_results.reserve(layout.nbytes)
        canvas_bytes = 3 * canvas[0] * canvas[1]
        self._kernels.run(
            (
                letterbox_launch(
                    letterbox, image.pointer, self._memory.canvases.pointer + index * canvas_bytes, image.pitch
                )
                for index, (image, letterbox) in enumerate(zip(images, letterboxes, strict=True))
            ),
            self._compute,
        )
        parameters = self._nms_parameters(prepared, len(images), nms)
        layout.bind(parameters, slot.results.pointer)

        def compute() -> None:
            prepared.context.enqueue(self._compute)
            self._kernels.run(nms_launches(parameters), self._compute)
            download(slot.pinned_results.pinned, slot.results.pointer, layout.nbytes, self._compute)

        addresses = (self._memory.epoch, slot.results.pointer, slot.pinned_results.pointer)
        self._replay(slot, (prepared.serial, len(images), nms, *addresses), prepared, compute)
        slot.done.record(self._compute)
        return layout

    def _replay(self, slot: Slot, key: Hashable, prepared: _Prepared, compute: Callable[[], None]) -> None:
        """The first time as it is (TensorRT settles its resources then), the second time recorded, then replayed."""
        known, graph = slot.graph(key)
        if known and graph is None and prepared.capturable:
            graph = self._capture(prepared, compute)
        slot.keep_graph(key, graph)
        if graph is None:
            compute()
        else:
            graph.launch(self._compute)

    def _capture(self, prepared: _Prepared, compute: Callable[[], None]) -> Graph | None:
        """The work as a graph; None, said once, where TensorRT or the driver cannot record it."""
        why = "TensorRT says so"
        if prepared.context.capturable(self._compute):
            try:
                with Graph.capture(self._compute) as made:
                    compute()
                return made[0]
            except TensorRtError as error:
                why = str(error)
            except DriverError as error:
                if "STREAM_CAPTURE" not in error.name:
                    raise
                why = str(error)
        prepared.capturable = False
        log.warning("%s: cannot be recorded as a CUDA graph and runs without (%s)", prepared.engine.where, why)
        return None

    def _prepare(self, engine: Engine, count: int, canvas: tuple[int, int]) -> _Prepared:
        """The context for so many images, with memory and addresses."""
        batch = max(count, engine.least_batch)
        key = (canvas, batch)
        prepared = self._prepared.pop(key, None)
        if prepared is None:
            prepared = _prepared(engine, batch, canvas, next(self._serials))
        self._prepared[key] = prepared
        while len(self._prepared) > _KEPT_CONTEXTS:
            self._compute.synchronize()
            self._prepared.pop(next(iter(self._prepared))).context.close()
        memory = self._memory
        if self._outgrows(prepared):
            self._compute.synchronize()
        memory.reserve(*_sizes(prepared))
        if prepared.epoch != memory.epoch:
            addresses = {name: memory.heads.pointer + offset for name, _, _, offset in prepared.heads}
            addresses[engine.input.name] = memory.canvases.pointer
            prepared.context.give_memory(memory.scratch.pointer, memory.scratch.bytes, addresses)
            prepared.epoch = memory.epoch
        return prepared

    def _nms_parameters(self, prepared: _Prepared, images: int, nms: NmsSettings) -> NmsParameters:
        spec = self.spec
        geometries = head_geometries(spec, prepared.canvas_hw)
        half = prepared.heads[0][2] == np.float16
        parameters = nms_parameters(geometries, spec.num_classes, nms, half_heads=half)
        parameters.batch = images
        for head, (_, _, _, offset) in zip(parameters.heads, prepared.heads, strict=False):
            head.raw = self._memory.heads.pointer + offset
        bind_workspace(parameters, self._memory.workspace.pointer)
        return parameters

    def _outgrows(self, prepared: _Prepared) -> bool:
        memory = self._memory
        held = (memory.canvases.bytes, memory.heads.bytes, memory.scratch.bytes, memory.workspace.bytes)
        return any(size > have for size, have in zip(_sizes(prepared), held, strict=True))

    def _shrink(self, engine: Engine, canvas: tuple[int, int], size: int, error: Exception) -> None:
        """After a batch did not fit: give everything back and try with half of it, and say so."""
        with self._submitting, self._device.current():
            self._give_back()
            free, total = self._device.memory()
        if size <= engine.least_batch:
            raise ArtifactError(
                f"{engine.where}: a batch of {size} does not fit the {self._device.name}: {free / 2**30:.1f} of "
                f"{total / 2**30:.1f} GiB are free ({error}); end other programs on it, or export for a smaller canvas"
            ) from error
        with self._submitting:
            fits = max(size // 2, engine.least_batch)
            self._most[canvas] = min(self._most.get(canvas, fits), fits)
        log.warning(
            "%s: a batch of %d does not fit the %s (%s); going on with %d at a time",
            engine.where, size, self._device.name, error, self._most[canvas],
        )  # fmt: skip

    def _give_back(self) -> None:
        """Drop contexts and shared memory, and what the free slots hold. Other slots' runs end first."""
        self._copies.synchronize()
        self._compute.synchronize()
        for prepared in self._prepared.values():
            prepared.context.close()
        self._prepared.clear()
        self._memory.drop()
        idle: list[Slot] = []
        try:
            with suppress(queue.Empty):  # others take slots meanwhile
                while True:
                    idle.append(self._free.get_nowait())
                    idle[-1].drop()
        finally:
            for slot in idle:
                self._free.put(slot)

    def _release(self) -> None:
        with self._device, self._device.current(), self._resources, self._submitting:
            try:
                if self._prepared and self._free.qsize() < SLOTS:  # a thread that was left behind has work in progress
                    self._compute.synchronize()
            finally:
                for prepared in self._prepared.values():
                    prepared.context.close()
                self._prepared.clear()


def engine_files(path: Path) -> list[Path]:
    """The engines that a path means: itself, or all of a folder, one a canvas. UsageError when there is none."""
    files = sorted(path.glob("*.engine")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{path}: holds no engine; 'parkdet export --engine tensorrt' makes one")
    return files


def _prepared(engine: Engine, batch: int, canvas: tuple[int, int], serial: int) -> _Prepared:
    context = engine.context(batch, canvas)
    heads, offset = [], 0
    for output in engine.outputs:
        shape, dtype = context.output_shapes[output.name], np.dtype(output.dtype)
        heads.append((output.name, shape, dtype, offset))
        offset += aligned(int(np.prod(shape)) * dtype.itemsize)
    return _Prepared(engine, context, batch, canvas, heads, offset, serial)


def _sizes(prepared: _Prepared) -> tuple[int, int, int, int]:
    """Bytes of canvases, heads, scratch and workspace that a run needs."""
    height, width = prepared.canvas_hw
    canvases = 3 * height * width * prepared.batch
    return canvases, prepared.heads_bytes, max(prepared.context.scratch_bytes, 1), workspace_bytes(prepared.batch)


def _results(slot: Slot, layout: OutputLayout, images: int) -> Found:
    return layout.read(slot.pinned_results.pinned.view(np.uint8, (layout.nbytes,)), images)


def _common_canvas(letterboxes: Sequence[Letterbox]) -> tuple[int, int]:
    canvases = {letterbox.canvas_hw for letterbox in letterboxes}
    if len(canvases) != 1:
        raise ValueError(f"the images of a batch share one canvas, these have {sorted(canvases)}")
    return canvases.pop()
