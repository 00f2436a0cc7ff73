"""`--precision int8` from start to end: quantise, hold against the checkpoint, and refuse what is not faster."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

from parkdet.export import int8
from parkdet.export.contenders import backend_contender
from parkdet.export.exporter import ExportJob, prove, settle
from parkdet.export.graph import GraphFile, float_graph, serialized
from parkdet.export.tensorrt_build import Say
from parkdet.runtime.backends.base import open_backend
from parkdet.runtime.errors import UsageError
from parkdet.runtime.shards import write_atomically


def export_int8(job: ExportJob, say: Say) -> Path:
    """The OpenVINO folder of a checkpoint in INT8. GateError where its detections or its speed are not good enough."""
    if job.graph.head != "raw" or job.graph.input_format != "uint8-nhwc":
        raise UsageError("--precision int8 makes a graph for the runtime: leave --head and --input as they are")
    int8.require_nncf()
    network = job.checkpoint.model
    pending = job.output.with_name(f".{job.output.name}.pending")
    reference = job.output.with_name(f".{job.output.name}.float32.pending.onnx")
    shutil.rmtree(pending, ignore_errors=True)
    try:
        say(f"exporting {job.options.weights}, {network.parameter_count():,} parameters ...")
        started = time.perf_counter()
        plain = float_graph(network, job.graph)
        write_atomically(reference, serialized(plain.model))
        graph = GraphFile(reference, plain.spec)
        del plain  # NNCF needs the memory
        images = [image.canvas for image in job.source.images(network.spec, job.graph.canvas_hw)]
        say(f"quantising on {len(images)} {job.source.words} ...")
        model, _ = int8.quantised(graph, images, say)
        of_int8, convolutions = int8.quantised_convolutions(model)
        int8.save(model, pending)
        del model
        seconds = time.perf_counter() - started
        size = sum(file.stat().st_size for file in pending.iterdir())
        say(f"graph: {of_int8} of {convolutions} convolutions in INT8, {size / 1e6:.1f} MB, in {seconds:.1f} s")
        figures: dict[str, object] = {
            "seconds to build the graph": round(seconds, 1),
            "bytes": size,
            "convolutions in INT8": f"{of_int8} of {convolutions}",
        }
        contender = backend_contender(pending / int8.MODEL_NAME, job.output.name, None, None)
        result = prove(job, [contender], [], figures, say)
        say("speed: INT8 and the float32 graph as the runtime runs it, in turns ...")
        with (
            open_backend(pending / int8.MODEL_NAME, goal="latency") as ours,
            open_backend(reference, goal="latency") as other,
        ):
            speed = int8.compare_speed(ours, other, images[0])
        say(f"speed: {speed}")
        findings = list(result.findings)
        if not speed.faster:
            findings.append(f"it is not faster than the float32 graph as the runtime runs it here: {speed}")
        result = dataclasses.replace(
            result, findings=tuple(findings), figures=result.figures | {"speed, batch 1": str(speed)}
        )
        settle(pending, job.output, result)
    finally:
        shutil.rmtree(pending, ignore_errors=True)
        reference.unlink(missing_ok=True)
    return job.output
