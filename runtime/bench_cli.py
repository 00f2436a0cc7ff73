"""`parkdet bench`: how fast an artifact is on this machine, and whether a job will be done in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from parkdet.runtime.cli import seconds_of


@click.command("bench", short_help="Measure a model: latency, throughput, stages, memory, limit.")
@click.option("--weights", required=True, type=click.Path(path_type=Path), metavar="FILE", help="Exported model.")
@click.option("--vs", type=click.Path(path_type=Path), metavar="FILE", help="Measure in turn with this one.")
@click.option("--source", type=click.Path(path_type=Path), metavar="DIR", help="Images.  [default: drawn 1080p PNGs]")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="Instead: a data set's test images.")
@click.option("--imgsz", "--img-size", type=click.IntRange(32, 16384), help="Long side.  [default: the model's]")
@click.option(
    "--batch-size", "batch_sizes", multiple=True, type=click.IntRange(1, 1024), default=(1,), show_default=True,
    help="May be repeated: the pipeline takes the one with most images/s.",
)  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(min=0.1, max=3600), default=5.0, show_default=True, help="A measurement."
)
@click.option("--images", type=click.IntRange(min=1), metavar="N", help="How long so many images will take.")
@click.option("--deadline", callback=seconds_of, metavar="TIME", help="With --images: will they be done in 3h?")
@click.option("--tta", is_flag=True, help="Insist on a model with test-time augmentation.")
@click.option(
    "--fallback", "fallbacks", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
    help="With --images: a cheaper model to step down to.  [default: as infer]",
)  # fmt: skip
@click.option("--backend", metavar="NAME", help="As infer.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="As infer.")
@click.option("--threads", type=click.IntRange(min=1), help="Processors for the model.  [default: the process's]")
@click.option("--device", help="As infer.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures here too."
)
def bench(
    json_path: Path | None,
    backend: str | None,
    precision: str | None,
    threads: int | None,
    device: str | None,
    **options: Any,
) -> None:
    """Measure an exported model on this machine.

    Latency percentiles one call at a time, images per second with as many calls as the model is made for, each stage
    of the pipeline alone and the whole of it, peak memory, and how far from the processor's limit that is. With --vs
    two models in turn, their ratio and its spread. With --images and --deadline: will it be done in time, and by
    which plans? Exit code 3 if not.
    """
    from parkdet.runtime.bench_report import BenchOptions, run_bench

    how = {"backend": backend, "precision": precision, "threads": threads, "device": device}
    run_bench(BenchOptions(how=how, **options), json_path)
