"""Rates, momenta, accumulation and EMA decay against closed forms; parameter groups and EMA against torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from parkdet.train.config import TrainSettings, load_recipe
from parkdet.train.ema import WeightAverage, ema_decay
from parkdet.train.model.network import build_network
from parkdet.train.optimizer import BIASES, NORMS, WEIGHTS, apply_plan, make_optimizer
from parkdet.train.schedule import Schedule


def test_the_contests_two_stages_by_closed_forms() -> None:
    # 21,650 training images / 15 parts = 1,443; at batch 2: 722 batches an epoch.
    batches = 722
    expectations = {
        "baseline": (50, 0.01, 0.01, 0.937, 3 * 722, 0.8, 0.1),
        "finetune": (15, 0.0032, 0.12, 0.843, 2 * 722, 0.5, 0.05),
    }
    for name, settings in load_recipe("contest").stage_settings():
        epochs, lr0, lrf, momentum, warmup, warm_momentum, warm_bias = expectations[name]
        schedule = Schedule(settings, batches)
        assert (settings.epochs, schedule.warmup_steps, schedule.full_accumulate) == (epochs, warmup, 32)
        assert schedule.weight_decay == pytest.approx(settings.weight_decay)
        for epoch in range(epochs):
            lr = lr0 * (1 - (1 - lrf) * epoch / epochs)
            for step in (epoch * batches, epoch * batches + 359, epoch * batches + 721):
                plan = schedule.plan(step)
                share = np.interp(step, [0, warmup], [0, 1])
                assert plan.lr == pytest.approx(lr * share)
                assert plan.bias_lr == pytest.approx(warm_bias + (lr - warm_bias) * share)
                assert plan.momentum == pytest.approx(warm_momentum + (momentum - warm_momentum) * share)
                assert plan.accumulate == max(1, np.interp(step, [0, warmup], [1, 32]).round())


def test_the_cosine_falls_from_one_to_lrf() -> None:
    schedule = Schedule(TrainSettings(epochs=10, lrf=0.2, cos_lr=True), 1000)
    for epoch in range(10):
        assert schedule.lr_share(schedule.progress(epoch * 1000)) == pytest.approx(
            0.2 + 0.8 * (1 + math.cos(math.pi * epoch / 10)) / 2
        )


def test_warm_up_takes_a_hundred_steps_at_least() -> None:
    assert Schedule(TrainSettings(warmup_epochs=3), 5).warmup_steps == 100
    assert Schedule(TrainSettings(warmup_epochs=3), 50).warmup_steps == 150


def test_a_nominal_batch_of_the_batch_steps_every_time() -> None:
    schedule = Schedule(TrainSettings(batch_size=16, nominal_batch=16), 10)
    assert {schedule.plan(step).accumulate for step in range(200)} == {1}
    assert Schedule(TrainSettings(batch_size=48, nominal_batch=64), 10).weight_decay == pytest.approx(0.0005 * 48 / 64)


def test_the_groups_hold_every_parameter_once() -> None:
    network = build_network("yolov5n", ["a", "b"], 64)
    optimizer = make_optimizer(network, TrainSettings(), 0.0005)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    assert all(name.endswith(".bias") for name in groups[BIASES])
    assert all(name.endswith("bn.weight") for name in groups[NORMS])
    assert not any("bn" in name or name.endswith("bias") for name in groups[WEIGHTS])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0, 0.0005]
    assert all(group["nesterov"] for group in optimizer.param_groups)


def test_a_plan_reaches_the_groups() -> None:
    network = build_network("yolov5n", ["a"], 64)
    settings = TrainSettings()
    optimizer = make_optimizer(network, settings, 0.0)
    plan = Schedule(settings, 100).plan(30)
    apply_plan(optimizer, plan)
    assert [group["lr"] for group in optimizer.param_groups] == [plan.bias_lr, plan.lr, plan.lr]
    assert {group["momentum"] for group in optimizer.param_groups} == {plan.momentum}
    adam = make_optimizer(network, TrainSettings(optimizer="AdamW"), 0.0)
    apply_plan(adam, plan)
    assert adam.param_groups[0]["betas"] == (settings.momentum, 0.999)


@pytest.mark.parametrize(("given", "limit", "ramp"), [((), 0.9999, 2000), ((0.998, 200), 0.998, 200)])
def test_the_average_follows_its_decay_buffers_too(given: tuple[float, ...], limit: float, ramp: float) -> None:
    network = build_network("yolov5n", ["a"], 64)
    average = WeightAverage(network, *given)
    key, counter = "model.0.bn.running_mean", "model.0.bn.num_batches_tracked"
    expected = network.state_dict()[key].double().clone()
    for n in range(1, 6):
        with torch.no_grad():
            network.state_dict()[key].fill_(float(n))
            network.state_dict()[counter].fill_(n)
        average.update(network)
        decay = limit * (1 - math.exp(-n / ramp))
        assert ema_decay(n, *given) == pytest.approx(decay, rel=1e-12)
        expected = expected * decay + n * (1 - decay)
    torch.testing.assert_close(average.network.state_dict()[key].double(), expected, rtol=1e-5, atol=1e-6)
    assert average.network.state_dict()[counter] == 5
    assert average.updates == 5
