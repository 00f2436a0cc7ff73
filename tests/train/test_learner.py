"""Parts of a recipe that live in the learner and the loop: freezing, sizes, patience, gradients that are no numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from parkdet.runtime.errors import DataError, UsageError
from parkdet.train.checkpoint import load_checkpoint
from parkdet.train.config import TrainSettings, ValSettings
from parkdet.train.data.samples import Sample
from parkdet.train.learner import Learner, frozen_layers
from parkdet.train.loop import StageJob, StageTrainer
from parkdet.train.model.network import Yolov5, build_network, build_network_like
from parkdet.train.schedule import StepPlan, scale_of_batch
from parkdet.train.starting import transfer

CPU = torch.device("cpu")
PLAN = StepPlan(bias_lr=0.01, lr=0.01, momentum=0.9, accumulate=1)


def network() -> Yolov5:
    torch.manual_seed(0)
    return build_network("yolov5n", ["a", "b"], 64)


def settings(**changes: Any) -> TrainSettings:
    values = {
        "epochs": 6,
        "imgsz": 64,
        "batch_size": 2,
        "nominal_batch": 2,
        "precision": "fp32",
        "warmup_bias_lr": 0.01,
    }
    return TrainSettings(**{**values, **changes})


def images_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    targets = torch.rand(6, 6, generator=generator) * 0.4 + 0.3
    targets[:, 0] = torch.tensor([0, 0, 0, 1, 1, 1])
    targets[:, 1] = 0
    return images, targets


def samples(folder: Path) -> list[Sample]:
    made = []
    for number in range(4):
        rng = np.random.default_rng(number)
        path = folder / f"{number}.png"
        path.write_bytes(cv2.imencode(".png", rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))[1].tobytes())
        made.append(Sample(number, path, (48, 64), np.zeros(1, np.int32), np.array([[4, 5, 30, 25]], np.float32)))
    return made


def trainer(folder: Path, wanted: TrainSettings, val: bool = True) -> tuple[StageTrainer, list[str]]:
    made, said = samples(folder), list[str]()
    job = StageJob(
        settings=wanted, val=ValSettings(), network=network(), train_samples=made, val_samples=made[:1] if val else (),
        folder=folder / "run", device=CPU, workers=0, provenance={},
    )  # fmt: skip
    return StageTrainer(job, said.append), said


@pytest.mark.parametrize("freeze", [10, (0, 3, 23)])
def test_frozen_layers_keep_their_weights_and_the_others_learn(freeze: int | tuple[int, ...]) -> None:
    learner = Learner(network(), settings(freeze=freeze), 0.0005, CPU)
    before = {name: p.detach().clone() for name, p in learner.network.named_parameters()}
    learner.network.train()
    for step in range(2):
        learner.take_in(*images_and_targets(), PLAN, step)
        assert learner.step_if_due(PLAN, step)
    frozen = set(range(freeze)) if isinstance(freeze, int) else set(freeze)
    for name, parameter in learner.network.named_parameters():
        layer = int(name.split(".")[1])
        assert torch.equal(parameter, before[name]) == (layer in frozen), name


def test_something_must_be_left_to_learn() -> None:
    with pytest.raises(UsageError, match="freeze: no layer is left to learn"):
        Learner(network(), settings(freeze=25), 0.0005, CPU)


def test_layers_that_are_not_there_cannot_be_frozen() -> None:
    assert frozen_layers(0, 25) == ()
    assert frozen_layers(3, 25) == (0, 1, 2)
    for wrong in (26, (1, 25), (-1,)):
        with pytest.raises(UsageError, match="freeze: there is no layer"):
            frozen_layers(wrong, 25)


def test_sizes_of_a_multi_scale_training() -> None:
    sizes = [scale_of_batch(3, step, 640, 32) for step in range(3000)]
    # What `randrange(imgsz * 0.5, imgsz * 1.5 + gs) // gs * gs` can give.
    assert set(sizes) == {value // 32 * 32 for value in range(320, 960 + 32)}
    assert sizes == [scale_of_batch(3, step, 640, 32) for step in range(3000)]
    assert sizes[:20] != [scale_of_batch(4, step, 640, 32) for step in range(20)]
    assert abs(np.mean(sizes) - 640) < 10
    assert min(scale_of_batch(0, step, 64, 32) for step in range(100)) == 64


def test_a_batch_is_seen_at_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner(network(), settings(), 0.0005, CPU)
    seen: list[torch.Tensor] = []
    forward = learner.network.forward

    def noting(images: torch.Tensor) -> list[torch.Tensor]:
        seen.append(images)
        return forward(images)

    monkeypatch.setattr(learner.network, "forward", noting)
    images, targets = images_and_targets()
    learner.take_in(images, targets, PLAN, 0, (96, 64))
    expected = F.interpolate(images.float() / 255, size=(96, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen[0], expected)


def test_patience_ends_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from parkdet.train import loop

    fitnesses = iter([0.2, 0.5, 0.4, 0.5, 0.3, 0.9])
    monkeypatch.setattr(loop, "metric", lambda *_: next(fitnesses))
    found, said = trainer(tmp_path, settings(patience=3))
    found.run()
    # The best is epoch 1; 2, 3 and 4 are no better.
    rows = (tmp_path / "run" / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + 5
    assert any("patience=3" in line and "epoch 1 is the best" in line for line in said)
    training = load_checkpoint(tmp_path / "run" / "weights" / "last.pt").training
    assert training["finished"]
    assert load_checkpoint(tmp_path / "run" / "weights" / "best.pt").training["epoch"] == 1


def test_gradients_that_are_not_finite_stop_before_the_weights_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = trainer(tmp_path, settings(mosaic=0.0), val=False)
    take_in = found.learner.take_in

    def spoiling(*batch: Any) -> torch.Tensor:
        parts = take_in(*batch)
        if batch[3] == 1:
            next(found.learner.network.parameters()).grad[0] = math.nan  # type: ignore[index]
        return parts

    monkeypatch.setattr(found.learner, "take_in", spoiling)
    with pytest.raises(DataError, match=r"the gradient is not finite in epoch 0, batch 1; the images were\n  \d\.png"):
        found.run()
    assert all(bool(torch.isfinite(p).all()) for p in found.learner.network.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_a_scaler_skips_a_step_that_overflows_and_its_state_is_kept(fails: bool) -> None:
    learner = Learner(network(), settings(), 0.0005, CPU)
    learner.precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    learner.network.train()
    before = learner.network.first_conv.weight.detach().clone()
    learner.take_in(*images_and_targets(), PLAN, 0)
    if fails:
        next(learner.network.parameters()).grad[0] = math.inf  # type: ignore[index]
    assert learner.step_if_due(PLAN, 0)
    assert torch.equal(learner.network.first_conv.weight, before) == fails
    assert learner.precision.scaler.get_scale() == (512.0 if fails else 1024.0)
    again = Learner(network(), settings(), 0.0005, CPU)
    again.precision.scaler = torch.amp.GradScaler("cpu")
    again.load_state(learner.state())
    assert again.precision.scaler.get_scale() == learner.precision.scaler.get_scale()


def test_gradients_that_overflow_at_every_scale_stop_a_training_with_a_scaler() -> None:
    """Else it would go on to its end without a single step."""
    learner = Learner(network(), settings(), 0.0005, CPU)
    learner.precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    learner.network.train()
    weight = next(learner.network.parameters())
    before = weight.detach().clone()
    found = []
    for step in range(5):
        # What the scaler has not met yet, it makes at its first scaling.
        learner.precision.scaler.scale(torch.zeros(1))
        weight.grad = torch.full_like(weight, math.inf)
        found.append(learner.step_if_due(PLAN, step))
    # At 8, 4, 2 and 1 it may still lack scale.
    assert found == [True, True, True, True, False]
    assert torch.equal(weight, before)


def test_what_is_taken_of_another_class_count() -> None:
    """The published figure for yolov5x6 with another number of classes; the tensors hold nothing here."""
    with torch.device("meta"):
        source = build_network("yolov5x6", [str(i) for i in range(80)], 640)
        target = build_network_like(source, build_network("yolov5x6", [str(i) for i in range(14)], 640).spec)
    state, own = source.state_dict(), target.state_dict()
    matching = [name for name in own if state[name].shape == own[name].shape]
    assert (len(matching), len(own)) == (955, 963)
    # And for tensors that hold something, by the function that copies them.
    source = build_network("yolov5n", ["a", "b", "c"], 64)
    target = network()
    taken, count = transfer(source, target)
    own = target.state_dict()
    assert (taken, count) == (len(own) - 6, len(own))
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, own[name]) if not name.startswith("model.24.m.") else tensor.shape != own[name].shape
