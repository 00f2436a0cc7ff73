"""The contest's 65 epochs played through without training: every batch's numbers against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from parkdet.runtime.model_spec import ModelSpec
from parkdet.train.config import load_recipe
from parkdet.train.data.sampling import batch_count, epoch_indices
from parkdet.train.ema import WeightAverage
from parkdet.train.model.loss import scaled_gains
from parkdet.train.model.network import load_architecture
from parkdet.train.optimizer import BIASES, apply_plan, make_optimizer
from parkdet.train.schedule import Schedule

TRAINED = 24_650 - 3_000
"""The contest's labelled images less those that validate."""
BATCHES = 722
"""Of two images, in an epoch of 21,650 // 15 = 1,443 places."""

# Baseline and fine-tune, from the description of the contest and the reference's two files.
EPOCHS = (50, 15)
LR0, LRF = (0.01, 0.0032), (0.01, 0.12)
MOMENTUM, WARM_MOMENTUM = (0.937, 0.843), (0.8, 0.5)
WARM_STEPS, WARM_BIAS = (3 * BATCHES, 2 * BATCHES), (0.1, 0.05)
DECAY = (0.0005, 0.00036)
BOX, CLS, OBJ = (0.05, 0.0296), (0.5, 0.243), (1.0, 0.301)


def test_an_epoch_is_a_fifteenth_of_the_training_set() -> None:
    for name, settings in load_recipe("contest").stage_settings():
        drawn = epoch_indices(TRAINED, settings.seed, 0, parts=settings.epoch_parts)
        assert len(drawn) == 1443, name
        assert batch_count(len(drawn), settings.batch_size) == BATCHES


@pytest.mark.parametrize("stage", [0, 1])
def test_every_batch_of_a_stage(stage: int) -> None:
    settings = load_recipe("contest").stage_settings()[stage][1]
    schedule = Schedule(settings, BATCHES)
    # Any network will do for the groups: one of each kind of parameter.
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=True), nn.BatchNorm2d(1))
    optimizer = make_optimizer(network, settings, schedule.weight_decay)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0, DECAY[stage]]
    last, gaps = -1, []
    for step in range(EPOCHS[stage] * BATCHES):
        epoch = step // BATCHES
        rate = LR0[stage] * ((1 - epoch / EPOCHS[stage]) * (1 - LRF[stage]) + LRF[stage])
        ramp = [0, WARM_STEPS[stage]]
        plan = schedule.plan(step)
        apply_plan(optimizer, plan)
        expected = [np.interp(step, ramp, [WARM_BIAS[stage], rate])] + [np.interp(step, ramp, [0.0, rate])] * 2
        momentum = np.interp(step, ramp, [WARM_MOMENTUM[stage], MOMENTUM[stage]])
        for group, lr in zip(optimizer.param_groups, expected, strict=True):
            assert math.isclose(group["lr"], lr, rel_tol=1e-12), (step, group["lr"], lr)
            assert math.isclose(group["momentum"], momentum, rel_tol=1e-12)
        assert plan.accumulate == max(1, round(float(np.interp(step, ramp, [1, 32]))))
        if step - last >= plan.accumulate:
            gaps.append(step - last)
            last = step
    assert schedule.end_step == EPOCHS[stage] * BATCHES
    assert optimizer.param_groups[BIASES]["lr"] == pytest.approx(
        LR0[stage] * (LRF[stage] + (1 - LRF[stage]) / EPOCHS[stage])
    )
    # After the warm-up every 32nd batch: 64 images. Before, more and more of them.
    steady = (EPOCHS[stage] * BATCHES - WARM_STEPS[stage]) // 32
    assert gaps[-steady + 2 :] == [32] * (steady - 2)
    assert gaps == sorted(gaps)


@pytest.mark.parametrize("stage", [0, 1])
def test_the_average_of_a_stage(stage: int) -> None:
    """The EMA over every optimizer step of the stage, of a weight that is the step's number."""
    settings = load_recipe("contest").stage_settings()[stage][1]
    schedule = Schedule(settings, BATCHES)
    network = nn.Linear(1, 1, bias=False)
    average = WeightAverage(network, settings.ema_decay, settings.ema_ramp)  # type: ignore[arg-type]
    expected, updates, last = float(network.weight.detach()), 0, -1
    for step in range(schedule.end_step):
        if step - last < schedule.plan(step).accumulate:
            continue
        last, updates = step, updates + 1
        with torch.no_grad():
            network.weight.fill_(float(updates))
        average.update(network)  # type: ignore[arg-type]
        kept = 0.9999 * (1 - math.exp(-updates / 2000))
        expected = expected * kept + updates * (1 - kept)
    assert average.updates == updates
    assert updates > EPOCHS[stage] * BATCHES // 32
    averaged = dict(average.network.named_parameters())["weight"]
    assert float(averaged) == pytest.approx(expected, rel=1e-4)


def test_the_gains_that_are_applied() -> None:
    architecture = load_architecture("yolov5x6")
    spec = ModelSpec(
        class_names=tuple(f"class {i}" for i in range(14)), strides=(8, 16, 32, 64), anchors=architecture.anchors,
        imgsz=1280,
    )  # fmt: skip
    for stage, (_, settings) in enumerate(load_recipe("contest").stage_settings()):
        gains = scaled_gains(spec, settings.imgsz, settings.box, settings.cls, settings.obj)
        assert gains["box"] == pytest.approx(BOX[stage] * 0.75)
        assert gains["cls"] == pytest.approx(CLS[stage] * 14 / 80 * 0.75)
        assert gains["obj"] == pytest.approx(OBJ[stage] * 4 * 0.75)
