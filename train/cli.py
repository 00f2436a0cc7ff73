"""`parkdet train` and `parkdet val`."""

from __future__ import annotations

import math
from pathlib import Path

import click

_DATA_HELP = "Data set in the contest's layout."


def _say(line: str) -> None:
    click.echo(line, err=True)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help=_DATA_HELP)
@click.option("--config", "config", help="Shipped recipe (contest, small, demo) or a YAML file.  [default: small]")
@click.option("--weights", type=click.Path(path_type=Path), help="Checkpoint to start from, ours or YOLOv5's.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with a run that was stopped.")
@click.option("--epochs", type=click.IntRange(min=1), help="Same as train.epochs=N.")
@click.option("--imgsz", type=click.IntRange(32, 16384), help="Same as train.imgsz=N.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Same as train.batch_size=N.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, or the number of a CUDA device.")
@click.option("--workers", type=click.IntRange(min=0), default=1, show_default=True, help="Processes that load images.")
@click.option("--project", type=click.Path(path_type=Path), default=Path("runs/train"), show_default=True)
@click.option("--name", default="exp", show_default=True, help="Run folder in the project; exp2, exp3, ... follow.")
@click.option("--exist-ok", is_flag=True, help="Write into the folder even if it is there.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(
    data: Path | None,
    config: str | None,
    weights: Path | None,
    resume: Path | None,
    epochs: int | None,
    imgsz: int | None,
    batch_size: int | None,
    device: str,
    workers: int,
    project: Path,
    name: str,
    exist_ok: bool,
    overrides: tuple[str, ...],
) -> None:
    """Train a detector: recipe and data set in, checkpoints out.

    KEY=VALUE replaces settings of the recipe, such as lr0=0.001 or train.optimizer=AdamW. Ctrl-C saves last.pt
    and stops; --resume RUN goes on at the same batch.
    """
    from parkdet.runtime.errors import UsageError
    from parkdet.runtime.run_folder import next_run_folder
    from parkdet.runtime.terminal import quiet_decoders
    from parkdet.train.checkpoint import load_checkpoint
    from parkdet.train.config import load_recipe
    from parkdet.train.model.network import load_architecture
    from parkdet.train.run import RunSettings, pick_device, resume_run, start_run
    from parkdet.train.training_data import read_training_data

    flags = {"epochs": epochs, "imgsz": imgsz, "batch_size": batch_size}
    given = (*overrides, *(f"train.{key}={value}" for key, value in flags.items() if value is not None))
    if resume is not None:
        if data is not None or config is not None or weights is not None or given:
            raise UsageError("--resume goes on with a run as it was started; give it alone")
        with quiet_decoders():
            best = resume_run(resume, _say)
        click.echo(str(best))
        return
    if data is None:
        raise UsageError("name the data set's folder with --data")
    recipe = load_recipe(config or "small", given)
    if weights is not None:
        recipe = recipe.model_copy(update={"weights": str(weights)})
    if recipe.weights is not None:
        # The run may be resumed from another folder.
        recipe = recipe.model_copy(update={"weights": str(Path(recipe.weights).resolve())})
    # What can be wrong with the input is found before a run folder is made.
    pick_device(device)
    parts = read_training_data(data, recipe)
    if recipe.weights is not None:
        load_checkpoint(recipe.weights)
    else:
        load_architecture(recipe.model)
    folder = next_run_folder(project, name, exist_ok)
    _say(f"run folder: {folder}")
    settings = RunSettings(data=str(data.resolve()), device=device, workers=workers, recipe=recipe)
    with quiet_decoders():
        best = start_run(folder, settings, _say, parts)
    _say(f"run folder: {folder}")
    click.echo(str(best))


@click.command()
@click.option("--weights", required=True, type=click.Path(path_type=Path), help="Checkpoint, ours or YOLOv5's.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help=_DATA_HELP)
@click.option("--config", help="Recipe whose split is validated on.  [default: the checkpoint's split, else small's]")
@click.option("--imgsz", type=click.IntRange(32, 16384), help="Long side in pixels.  [default: the checkpoint's]")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--conf-thres", type=click.FloatRange(0, 1), help="[default: the checkpoint's]")
@click.option("--iou-thres", type=click.FloatRange(0, 1), help="[default: the checkpoint's]")
@click.option("--max-det", type=click.IntRange(min=1), help="[default: the checkpoint's]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, or the number of a CUDA device.")
def val(
    weights: Path,
    data: Path,
    config: str | None,
    imgsz: int | None,
    batch_size: int,
    conf_thres: float | None,
    iou_thres: float | None,
    max_det: int | None,
    device: str,
) -> None:
    """Measure a checkpoint on the validation images: COCO AP by class."""
    from parkdet.runtime.errors import UsageError
    from parkdet.runtime.evaluation import evaluation_table
    from parkdet.runtime.terminal import quiet_decoders
    from parkdet.train.checkpoint import load_checkpoint
    from parkdet.train.config import SplitSettings, ValSettings, load_recipe
    from parkdet.train.run import pick_device
    from parkdet.train.training_data import read_training_data
    from parkdet.train.validate import validate

    for option, value in (("--conf-thres", conf_thres), ("--iou-thres", iou_thres)):
        if value is not None and math.isnan(value):  # which a range of click's lets pass
            raise UsageError(f"{option}: must be from 0 to 1, not {value}")
    recipe = load_recipe(config or "small")
    checkpoint = load_checkpoint(weights)
    if config is None and (split := checkpoint.training.get("split")):
        recipe = recipe.model_copy(update={"split": SplitSettings.model_validate(split)})
    parts = read_training_data(data, recipe)
    if checkpoint.spec.class_names != parts.class_names:
        raise UsageError(
            f"{weights} knows the classes {', '.join(checkpoint.spec.class_names)}; "
            f"{data} has {', '.join(parts.class_names)}"
        )
    spec = checkpoint.spec
    settings = ValSettings(
        conf=spec.conf if conf_thres is None else conf_thres,
        iou=spec.iou if iou_thres is None else iou_thres,
        max_det=spec.max_det if max_det is None else max_det,
    )
    with quiet_decoders():
        measured = validate(
            checkpoint.model.to(pick_device(device)), parts.val, settings,
            imgsz=imgsz or checkpoint.spec.imgsz, batch_size=batch_size,
        )  # fmt: skip
    assert measured is not None  # nobody can stop it but an interrupt
    for line in measured.unreadable:
        _say(f"warning: {line}")
    click.echo(evaluation_table(measured.evaluation))
