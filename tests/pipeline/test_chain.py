"""The commands one after the other, as a user types them, scored by pycocotools; and what interrupts them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from parkdet.train import load_checkpoint

TINY = ("imgsz=96", "batch_size=8", "nominal_batch=8", "cache=none", "mosaic=0.0", "precision=fp32")
Start = Callable[..., "subprocess.Popen[str]"]


def pycocotools_map50(truth: Path, submission: Path) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluation = COCOeval(coco, coco.loadRes(str(submission)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[1])


@pytest.mark.slow
def test_from_a_data_folder_to_a_submission(rectangles: Path, tmp_path: Path, start_cli: Start) -> None:
    def run(*arguments: str | Path) -> tuple[str, str]:
        process = start_cli(*arguments)
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
        return out, err

    run("prepare", "--data", rectangles, "--project", tmp_path / "prepare")
    out, err = run(
        "train", "--data", rectangles, "--project", tmp_path / "train", *TINY, "epochs=60", "lr0=0.02", "val_period=20"
    )
    best = Path(out.strip().splitlines()[-1])
    assert best == tmp_path / "train" / "exp" / "weights" / "best.pt"
    assert "mAP@.5:.95" in err
    with (best.parents[1] / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(60))
    assert rows[19]["metrics/mAP_0.5"] != "" == rows[18]["metrics/mAP_0.5"]
    assert torch.load(best, weights_only=True)["format"] == "parkdet.checkpoint"

    out, _ = run("export", "--weights", best, "--calibration", rectangles / "train" / "images")
    graph = Path(out.strip().splitlines()[-1])
    report = json.loads(graph.with_name("best.onnx.parity.json").read_text())
    assert report["passed"]
    # Where the processor has bf16, a second row tells of what `infer` will compute there; it is no gate's matter.
    in_float32, *_ = report["compared"]
    assert in_float32["unmatched"] == 0
    assert in_float32["detections"] > 0

    folders = {}
    for backend in ("openvino", "onnxruntime"):
        run("infer", "--weights", graph, "--data", rectangles, "--project", tmp_path / backend, "--backend", backend)
        folders[backend] = tmp_path / backend / "exp"
    _, err = run("infer", "--weights", graph, "--data", rectangles, "--project", tmp_path / "openvino")
    assert "nothing to do" in err
    for folder in folders.values():
        out, _ = run("submit", "--predictions", folder, "--data", rectangles, "--limit", "3000")
        submission = folder / "submission.json"
        assert submission.stat().st_size < 3000
        run("submit", "--check", submission, "--data", rectangles, "--limit", "3000")
        # The rectangles are easy; a chain with a wrong box or class anywhere stays near 0.
        assert pycocotools_map50(rectangles / "test_ground_truth.json", submission) > 0.5


def start_training(rectangles: Path, project: Path, start_cli: Start, *arguments: str) -> subprocess.Popen[str]:
    return start_cli("train", "--data", rectangles, "--project", project, *TINY, *arguments)


def wait_for_line(process: subprocess.Popen[str], wanted: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if wanted in line:
            return
    raise AssertionError(f"the process ended without '{wanted}'")


def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_weights(
    rectangles: Path, tmp_path: Path, start_cli: Start
) -> None:
    # Accumulating over 3 batches of 5 an epoch leaves gradients over at any stop.
    settings = ("epochs=3", "nominal_batch=24", "train.seed=5")
    undisturbed = start_training(rectangles, tmp_path / "a", start_cli, *settings)
    process = start_training(rectangles, tmp_path / "b", start_cli, *settings)
    wait_for_line(process, "Epoch")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "go on with: parkdet train --resume" in err
    last = tmp_path / "b" / "exp" / "weights" / "last.pt"
    stopped = load_checkpoint(last).training
    assert not stopped.get("finished")

    resumed = start_cli("train", "--resume", tmp_path / "b" / "exp")
    _, err = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, err
    assert undisturbed.wait(timeout=200) == 0
    ours = torch.load(last, weights_only=True)["model"]
    theirs = torch.load(tmp_path / "a" / "exp" / "weights" / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    results = [(tmp_path / run / "exp" / "results.csv").read_text() for run in "ab"]
    assert results[0] == results[1]

    again = start_cli("train", "--resume", tmp_path / "b" / "exp")
    _, err = again.communicate(timeout=60)
    assert again.returncode == 2
    assert "is finished" in err
    assert "--weights" in err


def test_stages_follow_one_another(rectangles: Path, tmp_path: Path, start_cli: Start) -> None:
    recipe = tmp_path / "two.yaml"
    recipe.write_text(
        "base: small.yaml\nmodel: yolov5n6\n"
        "train: {imgsz: 96, batch_size: 8, epoch_parts: 2, precision: fp32, cache: none}\n"
        "stages:\n  - {name: first, epochs: 1, image_weights: true}\n  - {name: second, epochs: 2, lr0: 0.001}\n"
    )
    process = start_cli("train", "--data", rectangles, "--config", recipe, "--project", tmp_path / "runs")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert Path(out.strip()) == tmp_path / "runs" / "exp" / "second" / "weights" / "best.pt"
    match_all = [line for line in err.splitlines() if "tensors from" in line]
    assert len(match_all) == 1
    count = load_checkpoint(Path(out.strip())).model.state_dict()
    assert f"{len(count)} of {len(count)} tensors" in match_all[0]


def test_transfer_says_what_was_taken(rectangles: Path, tmp_path: Path, start_cli: Start, shared: Path) -> None:
    weights = shared / "fixtures" / "yolov5n6_nc14_official.pt"
    process = start_training(rectangles, tmp_path, start_cli, "epochs=1", "--weights", str(weights))
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    # Fourteen classes become three: weight and bias of the four heads are new.
    total = len(load_checkpoint(weights).model.state_dict())
    assert f"{total - 8} of {total} tensors" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("train",), 2, ("--data",)),
        (("train", "--data", "nowhere"), 2, ("nowhere",)),
        (("train", "--data", "{data}", "--config", "nosuch"), 2, ("nosuch", "contest", "small")),
        (("train", "--data", "{data}", "lr00=1"), 2, ("lr00", "unknown key")),
        (("train", "--data", "{data}", "train.epochs=many"), 2, ("train.epochs", "whole number")),
        (("train", "--data", "{data}", "--weights", "none.pt"), 2, ("none.pt",)),
        (("train", "--data", "{data}", "--weights", "{empty}"), 1, ("is empty",)),
        (("train", "--data", "{data}", "--device", "7"), 2, ("CUDA",)),
        (("train", "--resume", "nowhere"), 2, ("nowhere",)),
        (("train", "--resume", "{data}", "--config", "small"), 2, ("alone",)),
        (("val", "--weights", "{empty}", "--data", "{data}"), 1, ("is empty",)),
        (("export", "--weights", "{empty}"), 1, ("is empty",)),
        (("export", "--weights", "none.pt"), 2, ("none.pt",)),
        (("infer", "--weights", "none.pt", "--data", "{data}"), 2, ("none.pt",)),
        (("infer", "--weights", "none.onnx", "--data", "{data}"), 2, ("none.onnx",)),
        (("infer", "--weights", "{empty}", "--data", "{data}"), 1, ("is empty",)),
    ],
)
def test_wrong_input_is_named_and_nothing_is_made(
    arguments: tuple[str, ...],
    code: int,
    words: tuple[str, ...],
    rectangles: Path,
    tmp_path: Path,
    run_cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = tmp_path / "empty.pt"
    empty.touch()
    monkeypatch.chdir(tmp_path)
    given = [argument.format(data=rectangles, empty=empty) for argument in arguments]
    found, out, err = run_cli(*given)
    assert found == code, err
    assert out == ""
    assert err.startswith("error: ")
    for word in words:
        assert word in err
    assert os.listdir(tmp_path) == ["empty.pt"]  # noqa: PTH208 - names alone
