"""Several processes against one: loss, gradients, steps; and a whole run under torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from parkdet.train.ranks import ALONE, process_group


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def in_processes(world: int, program: str, folder: Path) -> None:
    """Run a program in `world` processes that find one another as torchrun's do."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
                "FOLDER": str(folder),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    errors = [process.communicate(timeout=250)[1] for process in started]
    assert [process.returncode for process in started] == [0] * world, "\n".join(errors)


COMMON = """
    import os, sys
    from pathlib import Path
    import numpy as np
    import torch
    from torch import nn
    from parkdet.train.config import TrainSettings
    from parkdet.train.learner import Learner
    from parkdet.train.model.network import build_network
    from parkdet.train.ranks import process_group
    from parkdet.train.schedule import StepPlan

    def batches(images):
        generator = torch.Generator().manual_seed(5)
        made = []
        for number in range(3):
            pixels = torch.randint(0, 256, (images, 3, 64, 64), dtype=torch.uint8, generator=generator)
            targets = torch.rand(9, 6, generator=generator) * 0.5 + 0.2
            # Most boxes lie in the first images, and one image has none.
            targets[:, 0] = torch.tensor([0, 0, 0, 0, 0, 1, 1, 3, 3])[:9]
            targets[:, 1] = (torch.rand(9, generator=generator) * 2).long()
            if number == 1:
                targets = targets[targets[:, 0] < 2]  # the second process has no box at all
            made.append((pixels, targets))
        return made

    def learner_of(ranks, norms="eval", **settings):
        torch.manual_seed(0)
        network = build_network("yolov5n", ["a", "b"], 64)
        wanted = TrainSettings(imgsz=64, batch_size=4, precision="fp32", **settings)
        learner = Learner(network, wanted, 0.0005, torch.device("cpu"), ranks)
        learner.network.train()
        if norms == "eval":
            for module in learner.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return learner

    def share(batch, ranks):
        pixels, targets = batch
        size = len(pixels) // ranks.world
        mine = (targets[:, 0] // size).long() == ranks.rank
        own = targets[mine].clone()
        own[:, 0] -= ranks.rank * size
        return pixels[ranks.rank * size : (ranks.rank + 1) * size], own

    def gradients(learner):
        return {name: p.grad.clone() for name, p in learner.network.named_parameters() if p.grad is not None}
"""


SUMS = """
    def sums(ranks):
        results = []
        for settings, accumulate in (({}, 1), ({"fl_gamma": 1.5, "label_smoothing": 0.1, "obj_pw": 1.3}, 3)):
            learner = learner_of(ranks, cls_pw=0.7, **settings)
            plan = StepPlan(bias_lr=0.01, lr=0.01, momentum=0.9, accumulate=accumulate)
            parts = []
            for number, batch in enumerate(batches(4)[:accumulate]):
                parts.append(ranks.sum(learner.take_in(*share(batch, ranks), plan, number)))
            found = gradients(learner)
            assert learner.is_due(plan, number) and learner.step_if_due(plan, number)
            results.append({"parts": parts, "gradients": found, "weights": learner.network.state_dict()})
        return results
"""
RESUMED = """
    def resumed_is_undisturbed(ranks):
        made = batches(2 * ranks.world) * 2
        plan = StepPlan(bias_lr=0.01, lr=0.01, momentum=0.9, accumulate=2)

        def go(learner, numbers):
            for number in numbers:
                learner.take_in(*share(made[number], ranks), plan, number)
                learner.step_if_due(plan, number)

        undisturbed = learner_of(ranks, norms="train")
        go(undisturbed, range(6))
        stopped = learner_of(ranks, norms="train")
        # At an odd place: gradients of one batch wait, which are each process's own.
        go(stopped, range(3))
        state = ranks.from_first(stopped.state())
        resumed = learner_of(ranks, norms="train")
        resumed.load_state(state)
        go(resumed, range(3, 6))
        for name, tensor in undisturbed.network.state_dict().items():
            assert torch.equal(tensor, resumed.network.state_dict()[name]), name
            assert all(torch.equal(tensor, other) for other in ranks.gather(tensor)), name
        assert resumed.average.updates == undisturbed.average.updates == 3
        # By hand: the first normalisation after one batch, the mean of what each process saw.
        fresh = learner_of(ranks, norms="train")
        own = share(made[0], ranks)[0].float() / 255
        before = fresh.network.model[0].bn.running_mean.clone()
        seen = fresh.network.model[0].conv(own).mean(dim=(0, 2, 3)).detach()
        go(fresh, [0])
        mean = torch.stack(ranks.gather(seen)).mean(0)
        torch.testing.assert_close(fresh.network.model[0].bn.running_mean, before * 0.97 + 0.03 * mean)
"""


def test_two_processes_have_the_loss_gradients_and_steps_of_one(tmp_path: Path) -> None:
    """And stopped between two steps, they go on to the bit."""
    program = COMMON + SUMS + RESUMED
    run = """
    with process_group("cpu") as (ranks, _):
        assert ranks.world == 2
        results = sums(ranks)
        for result in results:
            for name, tensor in result["weights"].items():
                assert all(torch.equal(tensor, other) for other in ranks.gather(tensor)), name
        if ranks.first:
            torch.save(results, Path(os.environ["FOLDER"]) / "two.pt")
        resumed_is_undisturbed(ranks)
    """
    in_processes(2, program + run, tmp_path)
    here: dict[str, Any] = {}
    exec(textwrap.dedent(program), here)
    for one, two in zip(here["sums"](ALONE), torch.load(tmp_path / "two.pt"), strict=True):
        for alone, together in zip(one["parts"], two["parts"], strict=True):
            torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7)
        assert one["gradients"].keys() == two["gradients"].keys()
        largest = max(float(gradient.abs().max()) for gradient in one["gradients"].values())
        for name, gradient in one["gradients"].items():
            scale = float(gradient.abs().max())
            # Of its largest entry; a gradient that is nothing but rounding is compared with the network's.
            torch.testing.assert_close(two["gradients"][name], gradient, rtol=0, atol=1e-5 * max(scale, 1e-3 * largest))
        for name, tensor in one["weights"].items():
            torch.testing.assert_close(two["weights"][name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_three_processes_that_are_resumed_go_on_to_the_bit(tmp_path: Path) -> None:
    """With three, sums depend on the order in which the processes' values are added."""
    run = """
    with process_group("cpu") as (ranks, _):
        resumed_is_undisturbed(ranks)
    """
    in_processes(3, COMMON + RESUMED + run, tmp_path)


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("0") as (ranks, device):
        assert (ranks, device) == (ALONE, "0")
        assert ranks.gather("x") == ["x"]
        assert ranks.from_first("x") == "x"
        values = torch.ones(2)
        assert ranks.sum(values) is values
