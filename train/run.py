"""A whole training: data set, split, networks, the stages in a row, from the first one or from where it stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from parkdet.runtime.contest import ContestData
from parkdet.runtime.errors import DataError, UsageError
from parkdet.runtime.settings import Settings, dump_settings, load_settings
from parkdet.train.checkpoint import Checkpoint, load_checkpoint
from parkdet.train.config import Recipe, TrainSettings
from parkdet.train.data.samples import Sample, samples_from
from parkdet.train.data.split import split_ids
from parkdet.train.loop import StageJob, StageTrainer
from parkdet.train.model.network import Yolov5, build_network, build_network_like

ARGS_FILE = "args.yaml"
Say = Callable[[str], None]


class RunSettings(Settings):
    """Everything a run was started with: `args.yaml` in its folder, from which it is resumed."""

    data: str
    device: str = "auto"
    workers: int = 1
    recipe: Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """The two parts of the labelled images."""

    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    images_folder: Path


def read_training_data(root: Path, recipe: Recipe) -> TrainingData:
    """Read the labels and split them as the recipe says. DataError where there is nothing to train on."""
    data = ContestData(root)
    labels = data.train_labels()
    split = split_ids([record.image_id for record in labels.records], recipe.split.seed, recipe.split.count)
    train, val = samples_from(labels, split.train_ids), samples_from(labels, split.val_ids)
    if not train:
        raise DataError(f"{data.train_json}: none of its images can be used; run 'parkdet prepare' to see why")
    return TrainingData(
        train=train,
        val=val,
        class_names=labels.class_names,
        category_ids=tuple(labels.categories),
        images_folder=data.images_folder("train"),
    )


def start_run(folder: Path, settings: RunSettings, say: Say) -> Path:
    """Train in a fresh folder; returns the best checkpoint's path."""
    (folder / ARGS_FILE).write_text(dump_settings(settings), encoding="utf-8")
    return _train(folder, settings, say)


def resume_run(run: Path, say: Say) -> Path:
    """Go on with a run, given by its folder or a checkpoint in it; returns the best checkpoint's path."""
    folder = run if run.is_dir() else run.parent
    while not (folder / ARGS_FILE).is_file():
        if folder.parent == folder or not run.exists():
            raise UsageError(f"{run}: is not a training run (no {ARGS_FILE}); name the folder that train printed")
        folder = folder.parent
    say(f"resuming {folder}")
    return _train(folder, load_settings(RunSettings, folder / ARGS_FILE), say)


def _train(folder: Path, settings: RunSettings, say: Say) -> Path:
    recipe = settings.recipe
    device = pick_device(settings.device)
    data = read_training_data(Path(settings.data), recipe)
    boxes = sum(len(sample.class_ids) for sample in data.train)
    say(
        f"data: {len(data.train)} images with {boxes} boxes to train, {len(data.val)} to validate, "
        f"{len(data.class_names)} classes; device: {device}"
    )
    start: Checkpoint | None = load_checkpoint(recipe.weights) if recipe.weights else None
    best = folder / "weights" / "best.pt"
    stages = recipe.stage_settings()
    trained_any = False
    for number, (name, stage) in enumerate(stages):
        stage_folder = folder / name if name else folder
        job = StageJob(
            settings=stage,
            val=recipe.val,
            network=_network(recipe, data, stage, start, say),
            train_samples=data.train,
            val_samples=data.val,
            folder=stage_folder,
            device=device,
            workers=settings.workers,
            provenance={"run": str(folder), "images_folder": str(data.images_folder), "stage": name},
        )
        best = job.best
        before = load_checkpoint(job.last).training if job.last.is_file() else None
        if before is None or not before.get("finished"):
            trained_any = True
            if len(stages) > 1:
                say(f"stage {number + 1} of {len(stages)}: {name} ({stage_folder})")
            trainer = StageTrainer(job, say)
            if before is not None:
                trainer.resume_from(before)
                say(f"going on in epoch {trainer.epoch} at batch {trainer.batch}")
            trainer.run()
            _name_unreadable(trainer, say)
        start = load_checkpoint(job.last)
    if not trained_any:
        raise UsageError(
            f"{folder}: this run is finished; to train on from its weights: parkdet train --weights {best}"
        )
    return best


def _network(recipe: Recipe, data: TrainingData, stage: TrainSettings, start: Checkpoint | None, say: Say) -> Yolov5:
    torch.manual_seed(stage.seed)
    if start is None:
        network = build_network(recipe.model, data.class_names, stage.imgsz, data.category_ids)
        say(f"model: {recipe.model}, {network.parameter_count():,} parameters, random weights")
        return network
    # The layers and anchors are the checkpoint's; the classes are the data set's.
    spec = dataclasses.replace(
        start.spec,
        class_names=data.class_names,
        category_ids=data.category_ids,
        imgsz=stage.imgsz,
        checkpoint_sha256="",
    )
    network = build_network_like(start.model, spec)
    source, own = start.model.state_dict(), network.state_dict()
    taken = {name: tensor for name, tensor in source.items() if own[name].shape == tensor.shape}
    network.load_state_dict({**own, **taken})
    say(f"model: {network.parameter_count():,} parameters, {len(taken)} of {len(own)} tensors from {start.path}")
    return network


def _name_unreadable(trainer: StageTrainer, say: Say) -> None:
    if trainer.loader.unreadable:
        say(f"{len(trainer.loader.unreadable)} images could not be read and others took their place")


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `0` or `cuda:0`. UsageError where there is no such device."""
    text = name.strip().lower()
    if text in ("", "auto"):
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if text == "cpu":
        return torch.device("cpu")
    index = text.removeprefix("cuda").removeprefix(":") or "0"
    if not index.isdigit():
        raise UsageError(f"--device '{name}' is not auto, cpu, or the number of a CUDA device")
    if int(index) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices that torch can use"
        )
    return torch.device(f"cuda:{index}")
