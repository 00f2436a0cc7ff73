"""`parkdet infer` for checkpoints too: a .pt is exported and proven first, then the runtime takes over."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any

import click

from parkdet.runtime.cli import infer as infer_artifact


def exported(checkpoint: Path, images: Path | None, tta: bool = False) -> Path:
    """The ONNX file of a checkpoint, beside it: the one that is there if it is of this very file, else a new one.

    `best.onnx`, with test-time augmentation `best.tta.onnx`.
    """
    from parkdet.export.config import ExportOptions, GraphOptions
    from parkdet.export.exporter import export_onnx
    from parkdet.runtime.backends.onnx_file import read_onnx_metadata
    from parkdet.runtime.errors import ParkdetError, UsageError
    from parkdet.runtime.model_spec import SPEC_KEY, ModelSpec
    from parkdet.train.checkpoint import file_sha256

    if not checkpoint.is_file():
        found = "is not a file" if checkpoint.exists() else "there is no such file"
        raise UsageError(f"{checkpoint}: {found}; name the checkpoint that 'parkdet train' printed")
    artifact = checkpoint.with_suffix(".tta.onnx" if tta else ".onnx")
    if artifact.is_file():
        try:
            spec = ModelSpec.from_json(read_onnx_metadata(artifact).get(SPEC_KEY, ""), str(artifact))
            runs_here = (spec.input_format, spec.head, spec.precision) == ("uint8-nhwc", "raw", "fp32")
            same = runs_here and spec.tta == tta and spec.checkpoint_sha256 == file_sha256(checkpoint)
        except ParkdetError as error:
            click.echo(f"{error}; exporting again", err=True)
            same = False
        if same:
            click.echo(f"{artifact} was exported from this checkpoint and is used", err=True)
            return artifact
    options = ExportOptions(weights=checkpoint, calibration=images, output=artifact, graph=GraphOptions(tta=tta))
    return export_onnx(options, say=lambda line: click.echo(line, err=True))


def _images_of(options: dict[str, Any]) -> Path | None:
    """The folder of images that are about to be run: the export is proven on some of them."""
    from parkdet.runtime.contest import ContestData

    source: Path | None = options.get("source")
    data: Path | None = options.get("data")
    if data is not None:
        return ContestData(data).images_folder("test" if options.get("split") == "test" else "train")
    return source if source is not None and source.is_dir() else None


def _infer(**options: Any) -> None:
    weights: Path = options.pop("weights")
    options["started"] = time.monotonic()
    if weights.suffix.lower() == ".pt":
        images, tta = _images_of(options), bool(options["tta"])
        if tta and options["deadline"] is not None:
            exported(weights, images)  # what there is to step down to
        weights = exported(weights, images, tta)
    click.get_current_context().invoke(infer_artifact, weights=weights, **options)


infer = click.Command(
    "infer",
    params=infer_artifact.params,
    callback=_infer,
    short_help=infer_artifact.short_help,
    help=inspect.cleandoc(infer_artifact.help or "")
    + "\n\n\b\nWeights that are a checkpoint (.pt) are exported to ONNX beside it first, and proven equal.",
)
