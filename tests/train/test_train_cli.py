"""`parkdet train` as it is typed: YOLOv5's flags, what is refused before anything is made, what a finished run says."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parkdet.runtime.settings import load_settings
from parkdet.train.run import RunSettings
from tests.train.test_run import write_data

RunCli = Callable[..., Any]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--time-budget", "soon"), "--time-budget 'soon'"),
        (("--resume",), "no run has saved anything there"),
        (("--resume", "--epochs", "3"), "give it alone"),
        (("--resume", "--name", "exp3"), "--resume RUN"),
        (("--data", "nowhere", "--batch-size", "0"), "batch_size"),
        (("--data", "nowhere", "--hyp", "none.yaml"), "none.yaml"),
        ((), "--data"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_made(
    tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli("train", *arguments)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_flags_as_yolov5_has_them(tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data", 6)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hyp.yaml").write_text("lr0: 0.004\ncopy_paste: 0.5\n")
    code, out, err = run_cli(
        "train", "--data", data, "--hyp", "hyp.yaml", "--epochs", "1", "--imgsz", "64", "--batch-size", "4",
        "--device", "cpu", "--workers", "0", "--optimizer", "AdamW", "--label-smoothing", "0.1", "--freeze", "3",
        "--cache", "disk", "--patience", "7", "--save-period", "-1", "--seed", "5", "--cos-lr", "--image-weights",
        "--multi-scale", "--deterministic", "--noautoanchor", "--noval", "--rect", "--noplots", "--time-budget", "1h",
        f"cache_dir='{tmp_path / 'cache'}'", "precision=fp32", "lr0=0.002",
    )  # fmt: skip
    assert code == 0, err
    run = tmp_path / "runs" / "train" / "exp"
    assert out.strip() == str(Path("runs/train/exp/weights/best.pt"))
    settings = load_settings(RunSettings, run / "args.yaml")
    train = settings.recipe.train
    assert (train.epochs, train.imgsz, train.batch_size, train.optimizer) == (1, 64, 4, "AdamW")
    assert (train.label_smoothing, train.freeze, train.cache, train.patience) == (0.1, 3, "disk", 7)
    assert (train.save_period, train.seed, train.val_period) == (-1, 5, 0)
    assert train.cos_lr and train.image_weights and train.multi_scale and train.rect and train.deterministic
    assert not train.autoanchor
    # A setting on the command line has the last word over the file.
    assert (train.lr0, train.copy_paste) == (0.002, 0.5)
    assert settings.time_budget == 3600
    assert "time budget: " in err
    assert "anchors:" not in err
    # Of five images as many as the weights have drawn.
    assert 1 <= len(list((tmp_path / "cache").rglob("*.bgr"))) <= 5

    code, _, err = run_cli("train", "--resume")
    assert code == 2
    assert "this run is finished" in err
    assert f"--weights {run / 'weights' / 'best.pt'}" in err


@pytest.mark.parametrize("command", ["train", "val"])
def test_waiting_threads_sleep_soon_unless_the_user_says_else(
    command: str, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli, tmp_path: Path
) -> None:
    arguments = () if command == "train" else ("--weights", tmp_path / "none.pt", "--data", tmp_path)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back after the test
        monkeypatch.delenv(name)
    run_cli(command, *arguments)
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    run_cli(command, *arguments)
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    run_cli(command, *arguments)
    assert "GOMP_SPINCOUNT" not in os.environ
