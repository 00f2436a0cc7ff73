"""`parkdet export`: checkpoint to ONNX, OpenVINO or engine, proven equal before it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from parkdet.export.config import ExportOptions


def parse_canvas(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """`HxW` to (height, width)."""
    if value is None:
        return None
    height, _, width = value.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise click.BadParameter(f"'{value}' is not HEIGHTxWIDTH, such as 896x1600")
    return int(height), int(width)


def parse_batch(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """`N` to (N, N), `MIN-MAX` to (MIN, MAX)."""
    if value is None:
        return None
    low, dash, high = value.partition("-")
    if not low.isdecimal() or not (high.isdecimal() or not dash):
        raise click.BadParameter(f"'{value}' is neither a batch, such as 16, nor a range, such as 1-16")
    found = int(low), int(high or low)
    if not 1 <= found[0] <= found[1] <= 1024:
        raise click.BadParameter(f"'{value}': batches go from 1 to 1024, the smaller one first")
    return found


def parse_architectures(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """`75,86` or `7.5,8.6` or `sm75` to (75, 86)."""
    if value is None:
        return ()
    found = []
    for part in value.split(","):
        digits = part.strip().lower().removeprefix("sm_").removeprefix("sm").replace(".", "")
        if not digits.isdecimal():
            raise click.BadParameter(f"'{part.strip()}' is no compute capability, such as 86 (or 8.6)")
        found.append(int(digits))
    return tuple(found)


def parse_bytes(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    """`4GB`, `512MB` or a plain number of bytes."""
    if value is None:
        return None
    text = value.strip().upper()
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1), ("", 1)):
        if text.endswith(unit) and text.removesuffix(unit).strip().replace(".", "", 1).isdecimal():
            size = int(float(text.removesuffix(unit)) * factor)
            if size > 0:
                return size
            break
    raise click.BadParameter(f"'{value}' is no size, such as 4GB")


@click.command()
@click.option("--weights", required=True, type=click.Path(path_type=Path), help="Checkpoint (.pt), ours or YOLOv5's.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File to write (.onnx; with --engine the name that engines get; with int8 a folder).  "
    "[default: beside the weights]",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    help="Of the stored weights. fp16: for GPUs; int8: for OpenVINO on the CPU.  [default: fp32; fp16 with --engine]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Folder of images (at least 32 is best) on which the export is proven, and INT8 calibrated. The folder "
    "train/images of a data set brings its labels.  [default: the images that the checkpoint was trained on, if they "
    "are still there; else drawn ones]",
)
@click.option(
    "--imgsz", type=click.IntRange(32, 16384), help="Long side of images in pixels.  [default: the checkpoint's]"
)
@click.option(
    "--canvas", callback=parse_canvas, metavar="HxW",
    help="Fix the canvas, such as 896x1600.  [default: any; with --engine that of 16:9 images]",
)  # fmt: skip
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Take the canvas from the images of this data set: fixed where they agree, else a range.",
)
@click.option(
    "--batch-size", callback=parse_batch, metavar="N|MIN-MAX",
    help="Fix the batch, or say which an engine is for.  [default: any; engines 1-16]",
)  # fmt: skip
@click.option("--tta", is_flag=True, help="The graph makes the three test-time views and gives the heads of each.")
@click.option(
    "--input", "input_format", type=click.Choice(["uint8-nhwc", "float-nchw"]), default="uint8-nhwc",
    show_default=True, help="What the graph takes: BGR as OpenCV decodes, or RGB / 255 as other tools expect.",
)  # fmt: skip
@click.option(
    "--head", type=click.Choice(["raw", "decoded", "plugin"]), default="raw", show_default=True,
    help="What the graph returns: raw heads, boxes (B, N, 5 + classes), or detections of parkdet's NMS plugin.",
)  # fmt: skip
@click.option("--conf-thres", type=click.FloatRange(0, 1), help="Confidence it carries.  [default: the checkpoint's]")
@click.option("--iou-thres", type=click.FloatRange(0, 1), help="NMS IoU that it carries.  [default: the checkpoint's]")
@click.option("--max-det", type=click.IntRange(1), help="Detections an image it carries.  [default: the checkpoint's]")
@click.option("--engine", type=click.Choice(["tensorrt", "tensorrt-rtx"]), help="Build engines of the graph.")
@click.option(
    "--arch", callback=parse_architectures, metavar="75,86,...",
    help="Compute capabilities that engines are for. tensorrt-rtx needs no GPU to build; tensorrt builds on its own.",
)  # fmt: skip
@click.option(
    "--hardware", type=click.Choice(["none", "same-compute-capability", "ampere-plus"]), default="none",
    show_default=True, help="tensorrt: on which other GPUs the engine is to run as well.",
)  # fmt: skip
@click.option("--workspace", callback=parse_bytes, metavar="SIZE", help="Most memory a kernel may use, such as 4GB.")
@click.option(
    "--builder-level", type=click.IntRange(0, 5), help="0 builds fast, 5 runs fast.  [default: TensorRT's own]"
)
@click.option("--timing-cache", type=click.Path(path_type=Path), help="tensorrt: folder of earlier builds' timings.")
@click.option("--plugin", type=click.Path(path_type=Path), help="tensorrt: library of parkdet's NMS plugin.")
@click.option(
    "--backend", type=click.Choice(["openvino", "onnxruntime"]), help="What the gate runs a float32 graph with."
)
def export(**given: Any) -> None:
    """Export a checkpoint and prove that its detections are the checkpoint's.

    The graph takes uint8 BGR images (B, H, W, 3) as OpenCV decodes them and gives the raw heads, unless told otherwise;
    the model spec is in its metadata. Where the detections differ, the artifact is kept under `.rejected`, a report of
    the differences lies beside it, and the exit code is 3.

    \b
    parkdet export --weights best.pt                                          best.onnx, for any CPU
    parkdet export --weights best.pt --engine tensorrt-rtx --arch 75,86,89    engines, built without a GPU
    parkdet export --weights best.pt --precision int8 --calibration DIR       an OpenVINO folder, for the CPU
    """
    from parkdet.export.exporter import export_artifacts
    from parkdet.runtime.terminal import quiet_decoders

    options = options_of(given)
    with quiet_decoders():
        artifacts = export_artifacts(options, say=lambda line: click.echo(line, err=True))
    for artifact in artifacts:
        click.echo(str(artifact))


def options_of(given: dict[str, Any]) -> ExportOptions:
    """The command line as options. UsageError for what does not go together."""
    from parkdet.export.config import EngineOptions, ExportOptions, GraphOptions
    from parkdet.runtime.engine_sidecar import ShapeRange
    from parkdet.runtime.errors import UsageError

    engine = None
    if given["engine"] is not None:
        engine = EngineOptions(
            flavour=given["engine"], architectures=given["arch"], hardware=given["hardware"],
            workspace_bytes=given["workspace"], level=given["builder_level"], plugin=given["plugin"],
            timing_folder=given["timing_cache"],
        )  # fmt: skip
        if given["precision"] == "int8":
            raise UsageError("--precision int8 is for OpenVINO on the CPU; engines are fp16 or fp32")
    elif useless := [
        flag
        for flag, value in (
            ("--arch", given["arch"]), ("--workspace", given["workspace"]), ("--plugin", given["plugin"]),
            ("--builder-level", given["builder_level"] is not None), ("--timing-cache", given["timing_cache"]),
            ("--hardware", given["hardware"] != "none"),
        )
        if value
    ]:  # fmt: skip
        raise UsageError(f"{', '.join(useless)}: of use only with --engine")
    low, high = given["batch_size"] or (1, 16)
    ranged = given["batch_size"] is None or low != high
    if ranged and given["batch_size"] is not None and engine is None:
        raise UsageError(f"--batch-size {low}-{high}: an ONNX graph takes any batch or one; a range is for engines")
    return ExportOptions(
        weights=given["weights"],
        output=given["output"],
        calibration=given["calibration"],
        data=given["data"],
        imgsz=given["imgsz"],
        conf=given["conf_thres"],
        iou=given["iou_thres"],
        max_det=given["max_det"],
        backend=given["backend"],
        batches=ShapeRange(low=low, best=high, high=high),
        engine=engine,
        graph=GraphOptions(
            precision=given["precision"] or ("fp16" if engine else "fp32"),
            input_format=given["input_format"],
            head=given["head"],
            tta=given["tta"],
            canvas_hw=given["canvas"],
            batch=None if ranged else low,
        ),
    )
