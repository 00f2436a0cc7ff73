"""`parkdet train` and `parkdet val`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from parkdet.train.run import RunSettings
    from parkdet.train.training_data import TrainingData

_DATA_HELP = "Data set in the contest's layout."
_LATEST = "\0latest"
"""What `--resume` without a value stands for; no path can be it."""
SPIN_COUNT = "10000"
"""Turns that a waiting thread of OpenMP's makes before it sleeps: about 0.2 ms, longer than from one operation to the
next. libgomp has 300,000, which is longer than a process's turn on the core. A step of yolov5n (320 px, batch 16) on
two cores took 0.50 s with this, 0.51 with libgomp's, 0.57 with none (best of four); beside one busy process 1.42, 1.59
and 1.14 (median of three); beside several, at worst: 1.7, 7.5, 0.9."""


def _say(line: str) -> None:
    click.echo(line, err=True)


def _say_nothing(_line: str) -> None:
    """The voice of every process but the first."""


def let_waiting_threads_sleep() -> None:
    """Before torch is loaded: a thread that waits for the others soon gives up its core, unless the user says else.

    OpenMP's threads would spin for milliseconds at every operation's end. On a machine that is not quiet that keeps
    the core from the very thread that they wait for.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


_Option = Callable[[Callable[..., None]], Callable[..., None]]

_SHORTHANDS: tuple[tuple[str, Any, str], ...] = (
    ("--epochs", click.IntRange(min=1), "epochs={}"),
    ("--imgsz", click.IntRange(32, 16384), "imgsz={}"),
    ("--batch-size", click.IntRange(min=-1), "batch_size={}"),
    ("--optimizer", click.Choice(["SGD", "AdamW"]), "optimizer={}"),
    ("--label-smoothing", click.FloatRange(0, 1, max_open=True), "label_smoothing={}"),
    ("--freeze", click.IntRange(min=0), "freeze={}"),
    ("--cache", click.Choice(["none", "ram", "disk"]), "cache={}"),
    ("--patience", click.IntRange(min=0), "patience={}"),
    ("--save-period", click.IntRange(min=-1), "save_period={}"),
    ("--seed", click.IntRange(min=0), "seed={}"),
    ("--cos-lr", None, "cos_lr=true"),
    ("--image-weights", None, "image_weights=true"),
    ("--multi-scale", None, "multi_scale=true"),
    ("--rect", None, "rect=true"),
    ("--deterministic", None, "deterministic=true"),
    ("--noautoanchor", None, "autoanchor=false"),
    ("--noval", None, "val_period=0"),
)
"""YOLOv5's flags, and the setting of the recipe that each stands for; those of type None take no value."""


def _shorthands(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `_SHORTHANDS` to a command, as its keyword arguments."""
    for flag, kind, setting in reversed(_SHORTHANDS):
        about = f"Same as {setting.format('N' if isinstance(kind, click.IntRange) else 'VALUE')}."
        option: _Option = (
            click.option(flag, is_flag=True, help=about) if kind is None else click.option(flag, type=kind, help=about)
        )
        command = option(command)
    return command


def _settings_of(flags: Mapping[str, Any]) -> tuple[str, ...]:
    """The `train.KEY=VALUE` of the shorthands that were given."""
    values = ((setting, flags[flag.removeprefix("--").replace("-", "_")]) for flag, _, setting in _SHORTHANDS)
    # By identity: 0 is a value.
    return tuple(
        f"train.{setting.format(value)}" for setting, value in values if value is not None and value is not False
    )


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help=_DATA_HELP)
@click.option("--config", "config", help="Shipped recipe (contest, small, demo) or a YAML file.  [default: small]")
@click.option("--hyp", type=click.Path(path_type=Path), help="Settings over the recipe's: a hyp.yaml of YOLOv5's.")
@click.option("--weights", type=click.Path(path_type=Path), help="Checkpoint to start from, ours or YOLOv5's.")
@click.option(
    "--resume", is_flag=False, flag_value=_LATEST, metavar="[RUN]",
    help="Go on with a run that was stopped; without a value, with the latest.",
)  # fmt: skip
@click.option("--time-budget", metavar="TIME", help="36h, 90m, ...: as many of the recipe's epochs as fit.")
@_shorthands
@click.option("--device", default="auto", show_default=True, help="auto, cpu, or the number of a CUDA device.")
@click.option("--workers", type=click.IntRange(min=0), help="Processes that load images.  [default: 1]")
@click.option("--project", type=click.Path(path_type=Path), default=Path("runs/train"), show_default=True)
@click.option("--name", default="exp", show_default=True, help="Run folder in the project; exp2, exp3, ... follow.")
@click.option("--exist-ok", is_flag=True, help="Write into the folder even if it is there.")
@click.option("--noplots", is_flag=True, help="Draw nothing: no results.png, no pictures of batches.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(
    data: Path | None,
    config: str | None,
    hyp: Path | None,
    weights: Path | None,
    resume: str | None,
    time_budget: str | None,
    device: str,
    workers: int | None,
    project: Path,
    name: str,
    exist_ok: bool,
    noplots: bool,
    overrides: tuple[str, ...],
    **flags: Any,
) -> None:
    """Train a detector: recipe and data set in, checkpoints out.

    KEY=VALUE replaces settings of the recipe, such as lr0=0.001 or train.optimizer=AdamW. Ctrl-C saves last.pt
    and stops; --resume RUN goes on at the same batch. Under torchrun, every process takes a GPU.
    """
    let_waiting_threads_sleep()
    from parkdet.runtime.errors import UsageError
    from parkdet.runtime.run_folder import next_run_folder
    from parkdet.runtime.terminal import quiet_decoders
    from parkdet.train.budget import TimeBudget, parse_duration
    from parkdet.train.ranks import process_group
    from parkdet.train.run import latest_run, resume_run, start_run

    budget = TimeBudget(parse_duration(time_budget)) if time_budget is not None else None
    given = (*_settings_of(flags), *overrides)
    if resume is not None:
        _require_nothing_settled(given or config or hyp or weights)
    if resume is None and data is None:
        raise UsageError("name the data set's folder with --data")
    with process_group(device) as (ranks, device_name), quiet_decoders():
        say = _say if ranks.first else _say_nothing
        if resume is not None:
            # Rank 0 alone has the folder.
            run = latest_run(project) if resume == _LATEST and ranks.first else Path(resume)
            best = resume_run(
                run, say, ranks=ranks, device_name=device_name, workers=workers, plots=not noplots, data_folder=data,
                budget=budget,
            )  # fmt: skip
        else:
            assert data is not None
            settings, parts = _new_run(data, config, hyp, weights, given, device_name, check=ranks.first)
            settings = settings.model_copy(
                update={
                    "device": device,
                    "workers": 1 if workers is None else workers,
                    "plots": not noplots,
                    "time_budget": budget and budget.seconds,
                }
            )
            folder = ranks.from_first(next_run_folder(project, name, exist_ok) if ranks.first else Path())
            say(f"run folder: {folder}")
            best = start_run(folder, settings, say, parts, ranks=ranks, device_name=device_name, budget=budget)
            say(f"run folder: {folder}")
        if ranks.first:
            click.echo(str(best))


def _require_nothing_settled(recipe: object) -> None:
    """UsageError where beside `--resume` stands what the run was started with."""
    from parkdet.runtime.errors import UsageError

    if recipe:
        raise UsageError(
            "--resume goes on with a run as it was started; give it alone, or with --data (where the data set lies "
            "now), --device, --workers, --noplots, --time-budget"
        )
    if click.get_current_context().get_parameter_source("name") is click.core.ParameterSource.COMMANDLINE:
        raise UsageError("--resume goes on in the run's own folder; name that, and not its --name: --resume RUN")


def _new_run(
    data: Path,
    config: str | None,
    hyp: Path | None,
    weights: Path | None,
    given: tuple[str, ...],
    device_name: str,
    check: bool,
) -> tuple[RunSettings, TrainingData]:
    """The settings of a run that is to begin, and its data: what can be wrong is found before a folder is made.

    `check`: open what the run starts from too, which rank 0 alone has.
    """
    from parkdet.train.checkpoint import load_checkpoint
    from parkdet.train.config import hyp_overrides, load_recipe
    from parkdet.train.model.network import load_architecture
    from parkdet.train.run import RunSettings, pick_device
    from parkdet.train.training_data import read_training_data

    recipe = load_recipe(config or "small", (*(hyp_overrides(hyp) if hyp is not None else ()), *given))
    if weights is not None:
        recipe = recipe.model_copy(update={"weights": str(weights)})
    if recipe.weights is not None:
        # The run may be resumed from another folder.
        recipe = recipe.model_copy(update={"weights": str(Path(recipe.weights).resolve())})
    pick_device(device_name)
    parts = read_training_data(data, recipe)
    if check and recipe.weights is not None:
        load_checkpoint(recipe.weights)
    elif recipe.weights is None:
        load_architecture(recipe.model)
    return RunSettings(data=str(data.resolve()), recipe=recipe), parts


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
@click.option("--save-json", is_flag=True, help="Also write the detections as COCO's tools read them.")
@click.option("--project", type=click.Path(path_type=Path), default=Path("runs/val"), show_default=True)
@click.option("--name", default="exp", show_default=True, help="Run folder in the project; exp2, exp3, ... follow.")
@click.option("--exist-ok", is_flag=True, help="Write into the folder even if it is there.")
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
    save_json: bool,
    project: Path,
    name: str,
    exist_ok: bool,
) -> None:
    """Measure a checkpoint on the validation images: COCO AP by class.

    The run folder gets the curves, the confusion matrix and pictures of images with truth and detections.
    """
    let_waiting_threads_sleep()
    from parkdet.runtime.errors import UsageError
    from parkdet.runtime.evaluation import evaluation_note, evaluation_table
    from parkdet.runtime.run_folder import next_run_folder, sole_writer
    from parkdet.runtime.terminal import quiet_decoders
    from parkdet.train.checkpoint import load_checkpoint
    from parkdet.train.config import SplitSettings, ValSettings, load_recipe
    from parkdet.train.run import pick_device
    from parkdet.train.run_pictures import RunPictures
    from parkdet.train.training_data import read_training_data
    from parkdet.train.validate import validate, write_coco_json

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
    network = checkpoint.model.to(pick_device(device))
    folder = next_run_folder(project, name, exist_ok)
    _say(f"run folder: {folder}")
    with quiet_decoders(), sole_writer(folder):
        measured = validate(network, parts.val, settings, imgsz=imgsz or spec.imgsz, batch_size=batch_size)
        assert measured is not None  # nobody can stop it but an interrupt
        for line in measured.unreadable:
            _say(f"warning: {line}")
        click.echo(f"{evaluation_table(measured.evaluation)}\n{evaluation_note(measured.evaluation)}")
        RunPictures(folder, spec, _say).validation(measured)
        if save_json:
            write_coco_json(folder / f"{weights.stem}_predictions.json", measured, spec)
    _say(f"run folder: {folder}")
