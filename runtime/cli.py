"""`parkdet infer`: an artifact and images to a run folder of predictions."""

from __future__ import annotations

from pathlib import Path

import click


def seconds_of(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """A time span as users write it, in seconds."""
    from parkdet.runtime.deadline import parse_duration

    return None if value is None else parse_duration(value)


@click.command("infer", short_help="Detect objects in images: weights and images to predictions.")
@click.option(
    "--weights",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Exported model: .onnx, or an OpenVINO .xml or its folder.",
)
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="Data set in the contest's layout.")
@click.option(
    "--split",
    type=click.Choice(["test", "train", "val"]),
    default="test",
    show_default=True,
    help="Which images of --data; val: those that the model's training held out.",
)
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Instead of --data: a folder of images, or one image. Ids count from 1 by name; images.json has them.",
)
@click.option(
    "--imgsz",
    "--img-size",
    type=click.IntRange(32, 16384),
    help="Length in pixels to which the long side is scaled.  [default: the model's]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Images a call of the model. On the CPU 1 is as fast as more: several calls run side by side.",
)
@click.option(
    "--tta", is_flag=True, help="Test-time augmentation: three scales. The model must be exported with --tta."
)
@click.option(
    "--deadline",
    callback=seconds_of,
    metavar="TIME",
    help="Every image has a result in this time (3h, 45m, 90s): cheaper plans are used when the best is too slow.",
)
@click.option(
    "--fallback",
    "fallbacks",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --deadline: a cheaper exported model to step down to; may be repeated, best first.  "
    "[default: the one of the same checkpoint without --tta beside --weights]",
)
@click.option(
    "--conf-thres",
    type=click.FloatRange(0, 1),
    help="Objectness and score must be larger.  [default: the model's, 0.01 in the contest]",
)
@click.option(
    "--iou-thres",
    type=click.FloatRange(0, 1),
    help="IoU above which the lower of two boxes goes.  [default: the model's, 0.7 in the contest]",
)
@click.option(
    "--max-det",
    type=click.IntRange(min=1),
    help="Detections an image.  [default: the model's, 50 in the contest]",
)
@click.option("--best-class-only", is_flag=True, help="One class a box. By default one for every class that passes.")
@click.option("--agnostic-nms", is_flag=True, help="Boxes of different classes suppress one another.")
@click.option(
    "--backend",
    metavar="NAME",
    help="openvino, onnxruntime or onnxruntime-tensorrt.  [default: by file and device; openvino for ONNX on the CPU]",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    help="What a float32 model is computed in; boxes are float32.  [default: bf16 where the processor has it]",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Processors for the model.  [default: all that this process may use]",
)
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="ray: shards on the workers of a Ray cluster, which see the same files.",
)
@click.option("--address", help="With --executor ray: a running cluster's.  [default: one on this machine]")
@click.option(
    "--workers", type=click.IntRange(min=1), help="With --executor ray: how many.  [default: one a GPU, else a machine]"
)
@click.option("--device", help="Where the model runs: cpu, or cuda:0 (or 0).  [default: the backend's own]")
@click.option(
    "--project",
    type=click.Path(path_type=Path),
    default=Path("runs/detect"),
    show_default=True,
    help="Folder of the run folders.",
)
@click.option("--name", default="exp", show_default=True, help="Run folder; a number is added when it is taken.")
@click.option("--exist-ok", is_flag=True, help="Use the folder --name itself, or stop if another run has it.")
@click.option("--keep-candidates", is_flag=True, help="Store what enters NMS too: 'parkdet submit --tune' repeats it.")
@click.option("--fresh", is_flag=True, help="Begin a new run even if an equal one can be continued.")
def infer(
    weights: Path, conf_thres: float | None, iou_thres: float | None, best_class_only: bool, agnostic_nms: bool,
    **options: object,
) -> None:  # fmt: skip
    """Detect objects in all images and store the predictions in a run folder.

    A run that was interrupted goes on where it stopped: the same command again finds the newest
    folder of that --name with the same model, settings and images and does only what is missing
    (and tries images again that could not be read). A finished run is left as it is; --fresh
    begins a new one. Other settings or images get a new folder: exp, exp2, exp3, ...

    Exit code: 0 done, 1 done but for images that could not be read, or the folder is in use,
    2 usage, 3 the deadline came before the last image, 130 interrupted with the work so far saved.
    """
    from parkdet.runtime.inference import InferOptions, run_inference

    asked = InferOptions(
        conf=conf_thres,
        iou=iou_thres,
        multi_label=not best_class_only,
        agnostic=agnostic_nms,
        **options,  # type: ignore[arg-type]
    )
    run_inference(weights, asked).raise_unfinished()
