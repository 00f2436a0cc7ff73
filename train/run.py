"""A whole training: data set, split, networks, the stages in a row, from the first one or from where it stopped."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from parkdet.runtime.contest import ContestData
from parkdet.runtime.errors import DataError, UsageError
from parkdet.runtime.run_folder import sole_writer
from parkdet.runtime.settings import Settings, dump_settings, load_settings
from parkdet.runtime.split import split_ids
from parkdet.train.checkpoint import Checkpoint, load_checkpoint
from parkdet.train.config import Recipe, TrainSettings
from parkdet.train.data.samples import Sample, samples_from
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
    return TrainingData(
        train=samples_from(labels, split.train_ids),
        # A single image trains; there is none to validate on.
        val=samples_from(labels, split.val_ids) if split.val_ids else (),
        class_names=labels.class_names,
        category_ids=tuple(labels.categories),
        images_folder=data.images_folder("train"),
    )


def start_run(folder: Path, settings: RunSettings, say: Say, data: TrainingData | None = None) -> Path:
    """Train from the beginning; returns the best checkpoint's path.

    Checkpoints of an older run in the folder are removed: they would be taken for this one's. `data` is what
    `read_training_data` gave, if it was read already. InUseError where another process trains in the folder.
    """
    with sole_writer(folder):
        return _start(folder, settings, say, data)


def _start(folder: Path, settings: RunSettings, say: Say, data: TrainingData | None) -> Path:
    for name, _ in settings.recipe.stage_settings():
        for old in ("last.pt", "best.pt"):
            path = folder / name / "weights" / old
            if settings.recipe.weights and path.resolve() == Path(settings.recipe.weights).resolve():
                raise UsageError(f"{path}: would be overwritten by the run that starts from it; give another --name")
            path.unlink(missing_ok=True)
    (folder / ARGS_FILE).write_text(dump_settings(settings), encoding="utf-8")
    return _train(folder, settings, say, data or read_training_data(Path(settings.data), settings.recipe))


def resume_run(run: Path, say: Say) -> Path:
    """Go on with a run, given by its folder or a checkpoint in it; returns the best checkpoint's path."""
    folder = run.resolve() if run.is_dir() else run.resolve().parent
    while not run.exists() or not (folder / ARGS_FILE).is_file():
        if folder.parent == folder or not run.exists():
            raise UsageError(f"{run}: is not a training run (no {ARGS_FILE}); name the folder that train printed")
        folder = folder.parent
    say(f"resuming {folder}")
    settings = load_settings(RunSettings, folder / ARGS_FILE)
    with sole_writer(folder):
        return _train(folder, settings, say, read_training_data(Path(settings.data), settings.recipe))


def _train(folder: Path, settings: RunSettings, say: Say, data: TrainingData) -> Path:
    recipe = settings.recipe
    device = pick_device(settings.device)
    boxes = sum(len(sample.class_ids) for sample in data.train)
    say(
        f"data: {len(data.train)} images with {boxes} boxes to train, {len(data.val)} to validate, "
        f"{len(data.class_names)} classes; device: {device}"
    )
    if not data.val:
        say("warning: there is no image to validate on; best.pt will hold the last weights")
    start = Path(recipe.weights) if recipe.weights else None
    best = folder / "weights" / "best.pt"
    stages = recipe.stage_settings()
    trained_any = False
    for number, (name, stage) in enumerate(stages):
        stage_folder = folder / name if name else folder
        last, best = (stage_folder / "weights" / file for file in ("last.pt", "best.pt"))
        before = load_checkpoint(last) if last.is_file() else None
        if before is not None and before.training.get("finished"):
            start = last
            continue
        trained_any = True
        if len(stages) > 1:
            say(f"stage {number + 1} of {len(stages)}: {name} ({stage_folder})")
        if before is not None:
            network = _stopped_network(before, data)
        else:
            network = _network(recipe, data, stage, load_checkpoint(start) if start else None, say)
        imgsz = whole_cells(stage.imgsz, network.spec.stride_max)
        if imgsz != stage.imgsz:
            say(f"imgsz {stage.imgsz} becomes {imgsz}: a multiple of the largest stride, {network.spec.stride_max}")
        network.spec = dataclasses.replace(
            network.spec, imgsz=imgsz, split_seed=recipe.split.seed, split_count=recipe.split.count
        )
        job = StageJob(
            settings=stage.model_copy(update={"imgsz": imgsz}),
            val=recipe.val,
            network=network,
            train_samples=data.train,
            val_samples=data.val,
            folder=stage_folder,
            device=device,
            workers=settings.workers,
            provenance={
                "run": str(folder),
                "images_folder": str(data.images_folder),
                "stage": name,
                "split": recipe.split.model_dump(),
            },
        )
        trainer = StageTrainer(job, say)
        if before is not None:
            trainer.resume_from(before.training)
            say(f"going on in epoch {trainer.epoch} at batch {trainer.batch}")
        trainer.run()
        _name_unreadable(trainer, say)
        start = last
    if not trained_any:
        raise UsageError(
            f"{folder}: this run is finished; to train on from its weights: parkdet train --weights {best}"
        )
    return best


def whole_cells(imgsz: int, stride_max: int) -> int:
    """The size rounded up to a multiple of the largest stride, at least two: of one cell there are no statistics."""
    return max(math.ceil(imgsz / stride_max), 2) * stride_max


def _stopped_network(before: Checkpoint, data: TrainingData) -> Yolov5:
    """The network of a run that is resumed: its own file is enough, whatever became of what it started from."""
    spec = before.spec
    if (spec.class_names, spec.category_ids) != (data.class_names, data.category_ids):
        raise DataError(
            f"{before.path}: was trained on the classes {', '.join(spec.class_names)}, the data set now has "
            f"{', '.join(data.class_names)}; bring it back as it was, or begin anew with --weights"
        )
    before.model.spec = dataclasses.replace(spec, checkpoint_sha256="")
    return before.model


def _network(recipe: Recipe, data: TrainingData, stage: TrainSettings, start: Checkpoint | None, say: Say) -> Yolov5:
    torch.manual_seed(stage.seed)
    if start is None:
        network = build_network(recipe.model, data.class_names, stage.imgsz, data.category_ids)
        network.spec = dataclasses.replace(
            network.spec, conf=recipe.val.conf, iou=recipe.val.iou, max_det=recipe.val.max_det
        )
        say(f"model: {recipe.model}, {network.parameter_count():,} parameters, random weights")
        return network
    # The layers and anchors are the checkpoint's; the classes are the data set's.
    spec = dataclasses.replace(
        start.spec,
        class_names=data.class_names,
        category_ids=data.category_ids,
        imgsz=stage.imgsz,
        checkpoint_sha256="",
        conf=recipe.val.conf,
        iou=recipe.val.iou,
        max_det=recipe.val.max_det,
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
