"""One export from start to end: checkpoint, graph, gate, name; then engines, where they are asked for."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parkdet.export import report as gate_report
from parkdet.export.canvases import GATE_IMAGES, GateSource, canvases_of_data, gate_source
from parkdet.export.config import ExportOptions, GraphOptions
from parkdet.export.contenders import backend_contender, half_contender, runs_in_bf16, session_contender
from parkdet.export.graph import GraphFile, finished, float_graph, serialized
from parkdet.export.parity import Contender, compare
from parkdet.export.report import GateResult
from parkdet.export.tensorrt_build import Say
from parkdet.runtime.engine_sidecar import ShapeRange
from parkdet.runtime.errors import GateError, UsageError
from parkdet.runtime.geometry import canvas_hw as own_canvas_hw
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.shards import write_atomically
from parkdet.train.checkpoint import Checkpoint, load_checkpoint

WIDE_SCREEN = (1080, 1920)
"""Height and width of the images that an engine is for unless a canvas or a data set is named: the contest's."""
_SAY_EVERY = 5.0
_LONG = 30.0
"""Seconds from which on the gate says beforehand how long it will take."""


@dataclass(frozen=True, slots=True)
class ExportJob:
    """An export that was checked and may begin."""

    options: ExportOptions
    checkpoint: Checkpoint
    graph: GraphOptions
    """The options' graph, its canvas settled."""
    output: Path
    canvas_height: ShapeRange | None
    """Of engines; None where any canvas will do."""
    canvas_width: ShapeRange | None
    source: GateSource

    @property
    def stem(self) -> str:
        """Name that artifacts beside the output begin with: `best` of `best.fp16.onnx`."""
        name = self.output.name
        for suffix in (".onnx", ".engine", ".fp16"):
            name = name.removesuffix(suffix)
        return name


def export_artifacts(options: ExportOptions, say: Say) -> list[Path]:
    """Everything that the options ask for; returns what was written, the artifact to run last.

    GateError (exit 3) where detections differ; the artifact then lies under `.rejected`, and an older one of the right
    name is left as it was.
    """
    if options.graph.precision == "int8":
        from parkdet.export.int8_export import export_int8

        return [export_int8(prepared(options, say), say)]
    if options.engine is not None:
        from parkdet.export.engine_export import export_engines

        return export_engines(options, say)
    job = prepared(options, say)
    return [export_graph(job, say)[0]]


def export_onnx(options: ExportOptions, say: Say) -> Path:
    """Write the ONNX file of a checkpoint and its parity report beside it; returns the file's path."""
    return export_artifacts(options, say)[-1]


def prepared(options: ExportOptions, say: Say) -> ExportJob:
    """Check what was asked for before any work is done, and open the checkpoint."""
    output = _output(options)
    checkpoint = load_checkpoint(options.weights)
    network = checkpoint.model
    asked = {"imgsz": options.imgsz, "conf": options.conf, "iou": options.iou, "max_det": options.max_det}
    given: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    network.spec = dataclasses.replace(network.spec, **given)
    graph, height, width = _canvas(options, checkpoint, say)
    graph.check(network.spec.stride_max)
    trained_on = checkpoint.training.get("images_folder")
    source = gate_source(options.calibration, trained_on, network.spec)
    return ExportJob(options, checkpoint, graph, output, height, width, source)


def _output(options: ExportOptions) -> Path:
    if options.weights.suffix.lower() == ".onnx":
        raise UsageError(f"{options.weights}: is an ONNX file already; export takes a checkpoint (.pt)")
    precision = options.graph.precision
    if precision == "int8":
        output = options.output or options.weights.with_name(f"{options.weights.stem}_int8_openvino")
        if output.exists() and not (output.is_dir() and (output / "model.xml").is_file()):
            raise UsageError(f"{output}: is there and is no OpenVINO folder; name another with --output")
    else:
        output = options.output or options.weights.with_name(_file_name(options))
        suffixes = (".onnx", ".engine") if options.engine else (".onnx",)
        if output.suffix.lower() not in suffixes:
            raise UsageError(f"{output}: the output's name must end in {' or '.join(suffixes)}")
        if output.suffix.lower() == ".engine":
            output = output.with_suffix(".fp16.onnx" if precision == "fp16" else ".onnx")
        if output.is_dir():
            raise UsageError(f"{output}: is a folder; name a file to write with --output")
    if not output.parent.is_dir():
        raise UsageError(f"{output}: its folder does not exist; name a file to write with --output")
    return output


def _file_name(options: ExportOptions) -> str:
    """`best.onnx`, or a name that says what the graph is where the runtime's default graph is not that: none of these
    overwrites another.
    """
    graph = options.graph
    parts = [options.weights.stem]
    if graph.input_format == "float-nchw":
        parts.append("float")
    if graph.head != "raw":
        parts.append(graph.head)
    if graph.tta:
        parts.append("tta")
    if graph.precision == "fp16":
        parts.append("fp16")
    return ".".join([*parts, "onnx"])


def _canvas(
    options: ExportOptions, checkpoint: Checkpoint, say: Say
) -> tuple[GraphOptions, ShapeRange | None, ShapeRange | None]:
    """The canvas named, else the data set's, else for engines that of a 16:9 image; a range where there are several."""
    graph, spec = options.graph, checkpoint.spec
    if graph.canvas_hw is not None:
        return graph, ShapeRange.fixed(graph.canvas_hw[0]), ShapeRange.fixed(graph.canvas_hw[1])
    if options.data is None:
        if options.engine is None:
            return graph, None, None
        canvas = own_canvas_hw(WIDE_SCREEN, spec.imgsz, spec.stride_max)
        say(f"canvas: {canvas[0]}x{canvas[1]}, a 16:9 image's at {spec.imgsz} px (--canvas or --data name another)")
        graph = dataclasses.replace(graph, canvas_hw=canvas)
        return graph, ShapeRange.fixed(canvas[0]), ShapeRange.fixed(canvas[1])
    canvases = canvases_of_data(options.data, spec)
    shown = ", ".join(f"{h}x{w} ({count})" for (h, w), count in list(canvases.counts.items())[:4])
    more = f", {len(canvases.counts) - 4} more" if len(canvases.counts) > 4 else ""
    say(f"canvases of {options.data} (images): {shown}{more}")
    height, width = (ShapeRange(**dict(zip(("low", "best", "high"), canvases.bounds(axis), strict=True)))
                     for axis in (0, 1))  # fmt: skip
    if len(canvases.counts) == 1:
        graph = dataclasses.replace(graph, canvas_hw=canvases.most_frequent)
    return graph, height, width


def export_graph(job: ExportJob, say: Say) -> tuple[Path, ModelSpec]:
    """Build the graph, hold it against the checkpoint and give it its name."""
    network = job.checkpoint.model
    # Until the gate has passed the graphs bear names that no glob for *.onnx finds.
    pending = job.output.with_name(f".{job.output.stem}.pending.onnx")
    float32 = job.output.with_name(f".{job.output.stem}.float32.pending.onnx")
    try:
        say(f"exporting {job.options.weights}, {network.parameter_count():,} parameters ...")
        started = time.perf_counter()
        graph = float_graph(network, job.graph)
        plain = GraphFile(float32, graph.spec)
        if job.graph.precision == "fp16":
            write_atomically(float32, serialized(graph.model))
        graph = finished(network, graph, job.graph)
        for finding in graph.findings:
            say(f"warning: {finding}")
        write_atomically(pending, serialized(graph.model))
        seconds = time.perf_counter() - started
        say(f"graph: {pending.stat().st_size / 1e6:.1f} MB in {seconds:.1f} s")
        figures = {"seconds to build the graph": round(seconds, 1), "bytes": pending.stat().st_size}
        spec, findings = graph.spec, graph.findings
        del graph  # its weights are on the disk now; what the gate opens comes instead of them
        give_back_freed_memory()
        contenders = _graph_contenders(job, plain, GraphFile(pending, spec))
        result = prove(job, contenders, findings, figures, say)
        settle(pending, job.output, result)
    finally:
        pending.unlink(missing_ok=True)
        float32.unlink(missing_ok=True)
    return job.output, spec


def give_back_freed_memory() -> None:
    """Let the C library return what was freed: of YOLOv5x6 that is a gigabyte, which what comes next needs.

    Where it has no such call (not glibc) nothing changes.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _graph_contenders(
    job: ExportJob, plain: GraphFile, graph: GraphFile
) -> Sequence[AbstractContextManager[Contender]]:
    """Who is held against the checkpoint, each opened when its turn comes.

    The float32 graph always, and as the runtime computes it by itself where that is bf16; FP16 as stored, and as an
    engine computes it.
    """
    network, spec, name = job.checkpoint.model, graph.spec, job.output.name
    if spec.precision == "fp16":
        return [
            session_contender(network, plain, "the graph in float32"),
            session_contender(network, graph, name),
            half_contender(network, job.graph.tta),
        ]
    if spec.head != "raw" or spec.input_format != "uint8-nhwc":
        return [session_contender(network, graph, name)]
    found = [backend_contender(graph.path, name, job.options.backend, "fp32")]
    if job.options.backend in (None, "openvino") and runs_in_bf16():
        found.append(backend_contender(graph.path, name, job.options.backend, "bf16", refuses=False))
    return found


def prove(
    job: ExportJob,
    contenders: Sequence[AbstractContextManager[Contender]],
    warnings: Sequence[str],
    figures: Mapping[str, object],
    say: Say,
) -> GateResult:
    """Hold contenders against the checkpoint on the job's images."""
    network = job.checkpoint.model
    images = list(job.source.images(network.spec, job.graph.canvas_hw))
    say(f"gate: {len(images)} {job.source.words}")
    started = time.perf_counter()
    progress = GateProgress(len(images), len(contenders), say)
    reports = compare(network, contenders, images, job.graph.tta, progress.tell)
    measured = dict(figures) | {"seconds for the gate": round(time.perf_counter() - started, 1)}
    findings: list[str] = []
    noted = list(warnings)
    for one in reports:
        say(f"gate: {gate_report.line(one)}")
        outside = [f"{one.name}: {finding}" for finding in one.findings()]
        if outside and not one.refuses:
            outside.append("infer computes in bf16 on such a processor unless it is given --precision fp32")
        (findings if one.refuses else noted).extend(outside)
    if unread := len(job.source.paths) - len(images) if job.source.paths else 0:
        noted.append(f"{unread} of {len(job.source.paths)} images could not be read and were left out")
    if job.source.paths and len(images) < GATE_IMAGES:
        noted.append(f"{len(images)} images prove little; give --calibration at least {GATE_IMAGES}")
    if reports[0].images and reports[0].detections == 0:
        noted.append(
            "no detections of score 0.1 or more on these images, so only raw outputs were compared; name a folder of "
            "your images with --calibration"
        )
    for warning in noted:
        say(f"warning: {warning}")
    return GateResult(
        artifact=job.output.name,
        checkpoint=f"{job.options.weights.name} (SHA-256 {job.checkpoint.spec.checkpoint_sha256})",
        source=f"{len(images)} {job.source.words}",
        reports=tuple(reports),
        findings=tuple(findings),
        warnings=tuple(noted),
        figures=measured,
    )


class GateProgress:
    """What the user is told while the gate runs: how long it will take, then a line every few seconds."""

    def __init__(self, images: int, contenders: int, say: Say):
        self._images, self._passes, self._say = images, contenders + 1, say
        self._turn, self._number = "", 0
        self._began = self._said = time.monotonic()

    def tell(self, turn: str, done: int) -> None:
        """`done` images are done of the turn's pass."""
        now = time.monotonic()
        if turn != self._turn:
            self._turn, self._number = turn, self._number + 1
        per_image = (now - self._began) / done
        if self._number == 1 and done == 1 and per_image * self._images * self._passes > _LONG:
            whole = per_image * self._images * self._passes
            self._say(
                f"gate: {per_image:.1f} s an image for {turn}; with {self._passes - 1} others on {self._images} images "
                f"about {whole / 60:.0f} min. A folder of fewer images (--calibration) takes less, and proves less"
            )
            self._said = now
        if now - self._said >= _SAY_EVERY and done < self._images:
            left = per_image * (self._images - done)
            self._say(
                f"gate: {turn}, {done} of {self._images} images, about {left:.0f} s left "
                f"(pass {self._number} of {self._passes})"
            )
            self._said = now
        if done == self._images:
            self._began = now


def settle(pending: Path, output: Path, result: GateResult) -> None:
    """Give a file or folder its name, or the name that warns of it and GateError.

    The report is on the disk before anything is renamed: a disk that is full leaves the older artifact and its report.
    """
    rejected = output.with_name(f"{output.name}.rejected")
    target = output if result.passed else rejected
    try:
        gate_report.write(pending, result)
        _replace(pending, target)
        for part, place in zip(gate_report.paths(pending), gate_report.paths(target), strict=True):
            part.replace(place)
    finally:
        for part in gate_report.paths(pending):
            part.unlink(missing_ok=True)
    if not result.passed:
        raise GateError(
            f"{output}: refused, for it is not what the checkpoint is: {'; '.join(result.findings)}. "
            f"It is kept as {rejected}, the report beside it"
        )
    for left in (rejected, *gate_report.paths(rejected)):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    """Rename; a folder that is in the way is put aside first and removed afterwards."""
    if not target.is_dir():
        source.replace(target)
        return
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    target.replace(aside)
    source.replace(target)
    shutil.rmtree(aside)
