"""One export from start to end: checkpoint, graph, gate, name."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from parkdet.export.canvases import calibration_paths, canvas_of, generated_canvases
from parkdet.export.config import ExportOptions
from parkdet.export.graph import build_graph
from parkdet.export.parity import LIMITS, ParityReport, compare
from parkdet.runtime.backends.base import open_backend
from parkdet.runtime.errors import DataError, GateError, UsageError
from parkdet.runtime.geometry import ImageArray
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.shards import write_atomically
from parkdet.train.checkpoint import Checkpoint, load_checkpoint

Say = Callable[[str], None]


def export_onnx(options: ExportOptions, say: Say) -> Path:
    """Write the ONNX file of a checkpoint, and its parity report as JSON beside it; returns the file's path.

    GateError (exit 3) where detections differ; the graph then lies under `.rejected`, and an older file of the
    right name is left as it was.
    """
    if options.weights.suffix.lower() == ".onnx":
        raise UsageError(f"{options.weights}: is an ONNX file already; export takes a checkpoint (.pt)")
    output = options.output or options.weights.with_suffix(".onnx")
    if output.suffix.lower() != ".onnx":
        raise UsageError(f"{output}: the output's name must end in .onnx")
    if output.is_dir() or not output.parent.is_dir():
        what = "is a folder" if output.is_dir() else "its folder does not exist"
        raise UsageError(f"{output}: {what}; name a file to write with --output")
    checkpoint = load_checkpoint(options.weights)
    network = checkpoint.model
    if options.imgsz is not None:
        network.spec = dataclasses.replace(network.spec, imgsz=options.imgsz)
    images, source = _gate_images(options, checkpoint)
    say(f"exporting {options.weights}, {network.parameter_count():,} parameters")

    started = time.perf_counter()
    model = build_graph(network, options.graph)
    rejected = output.with_suffix(".onnx.rejected")
    # Until the gate has passed the graph bears the name that warns of it.
    pending = output.with_name(f".{output.stem}.pending.onnx")
    write_atomically(pending, model.SerializeToString())
    try:
        say(f"graph: {pending.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s")
        report = _prove(options, checkpoint, pending, images, say)
        say(f"gate: {_line(report)} on {report.images} {source}")
        if findings := report.findings(LIMITS["fp32"]):
            pending.replace(rejected)
            _write_report(rejected, report, source, passed=False)
            raise GateError(
                f"{options.weights}: the graph's detections are not the checkpoint's: {'; '.join(findings)}. "
                f"It is kept as {rejected}"
            )
        if report.detections == 0:
            say("warning: no detections of score 0.1 or more on these images, so only raw heads were compared; "
                "name a folder of your images with --calibration")  # fmt: skip
        pending.replace(output)
    finally:
        pending.unlink(missing_ok=True)
    _write_report(output, report, source, passed=True)
    rejected.unlink(missing_ok=True)
    return output


def _prove(
    options: ExportOptions, checkpoint: Checkpoint, graph: Path, images: Iterator[ImageArray], say: Say
) -> ParityReport:
    with open_backend(graph, options.backend, precision="fp32") as backend:
        say(f"gate: {backend.name} against torch, both float32 ...")
        return compare(checkpoint.model, backend.infer, images, options.graph.tta)


def _gate_images(options: ExportOptions, checkpoint: Checkpoint) -> tuple[Iterator[ImageArray], str]:
    """The gate's canvases, and what they are, in words."""
    spec = checkpoint.spec
    trained_on = checkpoint.training.get("images_folder")
    if options.calibration is not None:
        paths = calibration_paths(options.calibration)
        return _read(paths, spec, options.graph.canvas_hw), f"images of {options.calibration}"
    if trained_on and Path(trained_on).is_dir() and any(Path(trained_on).iterdir()):
        return _read(calibration_paths(Path(trained_on)), spec, options.graph.canvas_hw), f"images of {trained_on}"
    drawn = generated_canvases(spec, options.graph.canvas_hw)
    return iter(drawn), "drawn images (name a folder of your own with --calibration)"


def _read(paths: list[Path], spec: ModelSpec, canvas_hw: tuple[int, int] | None) -> Iterator[ImageArray]:
    read = 0
    for path in paths:
        try:
            canvas = canvas_of(path, spec, canvas_hw)
        except DataError:
            continue  # the gate needs some readable images, not every one; `prepare` reports the rest
        read += 1
        yield canvas
    if read == 0:
        raise DataError(f"{paths[0].parent}: none of {len(paths)} images could be read; run 'parkdet prepare'")


def _line(report: ParityReport) -> str:
    return (
        f"{report.detections} detections, {report.unmatched} unmatched, {report.reordered} reordered by NMS, "
        f"IoU p1 {report.iou_p1:.5f}, "
        f"score difference p99 {report.score_p99:.6f}, AP@.75 {report.ap75:.4f}, raw heads {report.head_max:.2g}"
    )


def _write_report(artifact: Path, report: ParityReport, source: str, passed: bool) -> None:
    content = {"artifact": artifact.name, "passed": passed, "images": source, **report.as_dict()}
    content["images"] = f"{report.images} {source}"
    path = artifact.with_name(f"{artifact.name}.parity.json")
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
