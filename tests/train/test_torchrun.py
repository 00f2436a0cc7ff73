"""A whole run of two processes under torchrun: who writes, and that a killed one ends as an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from parkdet.runtime.errors import DataError
from parkdet.train import load_checkpoint
from parkdet.train.run import resume_run
from tests.train.test_kill import tensors, write_data

SETTINGS = (
    "imgsz=64", "batch_size=4", "nominal_batch=12", "epochs=3", "cache=none", "precision=fp32", "image_weights=true",
    "mosaic=0.5", "val_period=2", "save_minutes=0.02", "optimizer=SGD", "lr0=0.01",
)  # fmt: skip


def torchrun(folder: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
         "parkdet.cli.main", "train", "--device", "cpu", "--project", str(folder), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)  # three runs of two processes, where each may have a part of one core
def test_two_processes_killed_and_resumed_end_as_undisturbed_ones(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    begin = ("--data", data, "--config", "small", "--noplots", *SETTINGS)
    process = torchrun(tmp_path / "alone", *begin)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    # Rank 0 alone talks and writes.
    assert out.strip() == str(tmp_path / "alone" / "exp" / "weights" / "best.pt")
    assert err.count("run folder:") == 2
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["exp"]
    assert len((tmp_path / "alone" / "exp" / "results.csv").read_text().splitlines()) == 4

    process = torchrun(tmp_path / "killed", *begin)
    last = tmp_path / "killed" / "exp" / "weights" / "last.pt"
    give_up = time.monotonic() + 200
    while not last.exists() and time.monotonic() < give_up:
        time.sleep(0.05)
    # torchrun puts its processes into groups of their own. Rank 0 is who holds the lock; rank 1 cannot go on alone.
    for pid in holders(last.parents[1] / ".lock"):
        os.kill(pid, signal.SIGKILL)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    training = load_checkpoint(last).training
    assert not training.get("finished")
    assert len(training["state"]["gradients"]) == 2

    # One process cannot go on with what two began.
    with pytest.raises(DataError, match="was stopped in 2 processes"):
        resume_run(last.parents[1], lambda _line: None)
    process = torchrun(tmp_path / "killed", "--resume", last.parents[1])
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    for name in ("last.pt", "best.pt"):
        first, second = (
            tensors(torch.load(tmp_path / run / "exp" / "weights" / name, weights_only=True))
            for run in ("alone", "killed")
        )
        assert first.keys() == second.keys()
        for place, tensor in first.items():
            assert torch.equal(tensor, second[place]), f"{name}{place}"
    texts = [(tmp_path / run / "exp" / "results.csv").read_text() for run in ("alone", "killed")]
    assert texts[0] == texts[1]


def holders(lock: Path) -> list[int]:
    """Processes that have a run's lock file open."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            if any(str(handle.readlink()) == str(lock) for handle in (process / "fd").iterdir()):
                found.append(int(process.name))
        except OSError:
            continue
    return found
