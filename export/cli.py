"""`parkdet export`: checkpoint to ONNX, proven equal before it gets its name."""

from __future__ import annotations

from pathlib import Path

import click


def parse_canvas(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """`HxW` to (height, width)."""
    if value is None:
        return None
    height, _, width = value.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise click.BadParameter(f"'{value}' is not HEIGHTxWIDTH, such as 896x1600")
    return int(height), int(width)


@click.command()
@click.option("--weights", required=True, type=click.Path(path_type=Path), help="Checkpoint (.pt), ours or YOLOv5's.")
@click.option("--output", type=click.Path(path_type=Path), help="ONNX file to write.  [default: beside the weights]")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Folder of images (at least 32 is best) on which the export is proven.  [default: the images that the "
    "checkpoint was trained on, if they are still there; else drawn ones]",
)
@click.option(
    "--imgsz", type=click.IntRange(32, 16384), help="Long side of images in pixels.  [default: the checkpoint's]"
)
@click.option(
    "--canvas", callback=parse_canvas, metavar="HxW", help="Fix the canvas, such as 896x1600.  [default: any]"
)
@click.option("--batch-size", type=click.IntRange(1, 1024), help="Fix the batch.  [default: any]")
@click.option(
    "--tta", is_flag=True, help="The graph makes the three test-time views itself and gives the heads of each."
)
@click.option("--backend", type=click.Choice(["openvino", "onnxruntime"]), help="What the gate runs the graph with.")
def export(
    weights: Path,
    output: Path | None,
    calibration: Path | None,
    imgsz: int | None,
    canvas: tuple[int, int] | None,
    batch_size: int | None,
    tta: bool,
    backend: str | None,
) -> None:
    """Export a checkpoint to ONNX and prove that its detections are the checkpoint's.

    The graph takes uint8 BGR images (B, H, W, 3) as OpenCV decodes them and gives the raw heads; the model spec
    is in its metadata. Where the detections differ, the graph is kept under `.rejected` and the exit code is 3.
    """
    from parkdet.export.config import ExportOptions, GraphOptions
    from parkdet.export.exporter import export_onnx
    from parkdet.runtime.terminal import quiet_decoders

    options = ExportOptions(
        weights=weights, output=output, calibration=calibration, imgsz=imgsz, backend=backend,
        graph=GraphOptions(tta=tta, canvas_hw=canvas, batch=batch_size),
    )  # fmt: skip
    with quiet_decoders():
        artifact = export_onnx(options, say=lambda line: click.echo(line, err=True))
    click.echo(str(artifact))
