"""The network that a training starts from: random weights, those of a checkpoint, or those of the stopped run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from parkdet.runtime.errors import DataError
from parkdet.train.checkpoint import Checkpoint
from parkdet.train.config import Recipe, TrainSettings
from parkdet.train.model.network import Yolov5, build_network, build_network_like
from parkdet.train.training_data import TrainingData


def stopped_network(before: Checkpoint, data: TrainingData) -> Yolov5:
    """The network of a run that is resumed: its own file is enough, whatever became of what it started from."""
    spec = before.spec
    if (spec.class_names, spec.category_ids) != (data.class_names, data.category_ids):
        raise DataError(
            f"{before.path}: was trained on the classes {', '.join(spec.class_names)}, the data set now has "
            f"{', '.join(data.class_names)}; bring it back as it was, or begin anew with --weights"
        )
    before.model.spec = dataclasses.replace(spec, checkpoint_sha256="")
    return before.model


def starting_network(
    recipe: Recipe, data: TrainingData, stage: TrainSettings, start: Checkpoint | None, say: Callable[[str], None]
) -> Yolov5:
    """The recipe's network with random weights, or the layers of a checkpoint with what fits of its weights."""
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
    taken, count = transfer(start.model, network)
    say(f"model: {network.parameter_count():,} parameters, {taken} of {count} tensors from {start.path}")
    return network


def transfer(source: Yolov5, network: Yolov5) -> tuple[int, int]:
    """Copy the tensors that have the same name and shape; how many those were, and how many the network has."""
    state, own = source.state_dict(), network.state_dict()
    taken = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    network.load_state_dict({**own, **taken})
    return len(taken), len(own)
