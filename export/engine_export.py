"""`--engine` from start to end: what can be built, the graph and its gate, the engines, and their own gate on a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from parkdet.export.config import EngineOptions, ExportOptions
from parkdet.export.contenders import backend_contender
from parkdet.export.engine import (
    EngineJob,
    Gpu,
    default_timing_folder,
    engine_name,
    local_gpu,
    targets,
    write_engine,
)
from parkdet.export.exporter import ExportJob, export_graph, give_back_freed_memory, prepared, prove, settle
from parkdet.export.tensorrt_build import BuildSettings, Say, load_bindings
from parkdet.runtime import engine_sidecar
from parkdet.runtime.engine_sidecar import ShapeRange, architecture_of
from parkdet.runtime.errors import ParkdetError, UsageError
from parkdet.runtime.model_spec import ModelSpec


def export_engines(options: ExportOptions, say: Say) -> list[Path]:
    """The graph's file, then an engine a target; each with its report. What cannot be is said before work begins."""
    engine = options.engine
    assert engine is not None
    _refuse_contradictions(options, engine)
    trt = load_bindings(engine.flavour)
    groups = targets(engine.flavour, engine.architectures, trt)
    gpu = local_gpu(engine.architectures) if engine.flavour == "tensorrt" else None
    job = prepared(options, say)
    path, spec = export_graph(job, say)
    written = [path]
    for group in groups:
        architectures = group or ((gpu.architecture,) if gpu else ())
        say(f"engine: {engine.flavour} {trt.__version__} for {', '.join(map(str, architectures))} ...")
        give_back_freed_memory()
        written.append(_export_engine(job, spec, engine, architectures, gpu, trt, say))
    return written


def _refuse_contradictions(options: ExportOptions, engine: EngineOptions) -> None:
    if engine.flavour == "tensorrt-rtx":
        for given, flag in (
            (options.graph.head == "plugin", "--head plugin (its parser aborts on plugins; use --head raw)"),
            (engine.hardware != "none", "--hardware (name the targets with --arch)"),
            (engine.plugin is not None, "--plugin (it has none)"),
        ):
            if given:
                raise UsageError(f"--engine tensorrt-rtx does not go with {flag}")
    if options.graph.head == "plugin" and (engine.plugin is None or not engine.plugin.is_file()):
        what = f"{engine.plugin}: there is no such file" if engine.plugin else "the graph ends in parkdet's NMS plugin"
        raise UsageError(f"{what}; name the plugin's library with --plugin")


def _export_engine(
    job: ExportJob, spec: ModelSpec, engine: EngineOptions, architectures: tuple[int, ...], gpu: Gpu | None,
    trt: object, say: Say,
) -> Path:  # fmt: skip
    assert (
        job.canvas_height is not None and job.canvas_width is not None
    )  # engines have a canvas, prepared() sees to it
    fixed = job.graph.batch
    settings = BuildSettings(
        flavour=engine.flavour,
        architectures=architectures if engine.flavour == "tensorrt-rtx" else (),
        hardware=engine.hardware,
        batch=ShapeRange.fixed(fixed) if fixed else job.options.batches,
        canvas_height=job.canvas_height,
        canvas_width=job.canvas_width,
        workspace_bytes=engine.workspace_bytes,
        level=engine.level,
        plugin=engine.plugin,
    )
    build = EngineJob(
        graph=job.output.read_bytes(),
        graph_name=job.output.name,
        spec=spec,
        settings=settings,
        gpu=gpu,
        timing_folder=engine.timing_folder or default_timing_folder(),
    )
    built, sidecar = build.build(trt, say)
    name = engine_name(job.stem, architectures)
    say(f"engine: {name}, {len(built.plan) / 1e6:.1f} MB in {built.seconds:.1f} s")
    output = job.output.with_name(name)
    pending = output.with_name(f".{name.removesuffix('.engine')}.pending.engine")
    try:
        write_engine(pending, built, sidecar)
        of_engine = dataclasses.replace(job, output=output)
        if others := " and ".join(
            f"--{flag} {value}"
            for flag, value, usual in (
                ("input", spec.input_format, "uint8-nhwc"),
                ("head", spec.head, "raw"),
            )
            if value != usual
        ):
            say(f"{name}: not run here, parkdet runs no engine of {others}; its graph passed the gate")
            pending.replace(output)
        elif _runs_here(architectures):
            contender = backend_contender(pending, f"{name} by {engine.flavour}", None, None)
            result = prove(of_engine, [contender], [], {"seconds to build": sidecar.build_seconds}, say)
            settle(pending, output, result)
        else:
            say(f"{name}: not run here, where there is no GPU for it; its graph passed the gate")
            pending.replace(output)
        engine_sidecar.sidecar_path(pending).replace(engine_sidecar.sidecar_path(output))
    finally:
        pending.unlink(missing_ok=True)
        engine_sidecar.sidecar_path(pending).unlink(missing_ok=True)
    return output


def _runs_here(architectures: tuple[int, ...]) -> bool:
    """Whether a GPU is here that an engine for these is for."""
    from parkdet.runtime.cuda.driver import Device

    try:
        with Device() as device:
            return architecture_of(*device.capability) in architectures
    except ParkdetError:
        return False
