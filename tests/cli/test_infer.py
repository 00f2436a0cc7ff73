"""`parkdet infer --weights best.pt`: the checkpoint is exported first, once, and again when it has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from parkdet.cli.infer import exported
from parkdet.runtime.errors import UsageError
from parkdet.runtime.store import read_predictions
from parkdet.train import save_checkpoint
from parkdet.train.model.network import Yolov5, build_network

RunCli = Callable[..., tuple[int, str, str]]


def network(seed: int) -> Yolov5:
    torch.manual_seed(seed)
    made = build_network("yolov5n", ["a", "b"], 64)
    with torch.no_grad():
        for conv in made.head_convs:
            assert conv.bias is not None
            conv.bias.view(3, -1)[:, 4:] = 1.0
    return made.eval()


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "사진"
    folder.mkdir()
    for number in range(3):
        image = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), image)
    return folder


def test_a_checkpoint_is_exported_once_and_after_every_change(
    run_cli: RunCli, tmp_path: Path, photographs: Path
) -> None:
    weights = tmp_path / "best.pt"
    save_checkpoint(weights, network(0))
    command = ("infer", "--weights", weights, "--source", photographs, "--project", tmp_path / "runs")
    code, _, err = run_cli(*command)
    assert code == 0, err
    assert "exporting" in err
    assert "gate: 3 images of" in err  # proven on the very images that are to be run
    first = (tmp_path / "best.onnx").read_bytes()
    assert len(read_predictions(tmp_path / "runs" / "exp")) > 0

    code, _, err = run_cli(*command)
    assert code == 0
    assert "is used" in err
    assert "nothing to do" in err
    assert (tmp_path / "best.onnx").read_bytes() == first

    save_checkpoint(weights, network(1))
    code, _, err = run_cli(*command)
    assert code == 0
    assert "exporting" in err
    assert (tmp_path / "best.onnx").read_bytes() != first
    assert (tmp_path / "runs" / "exp2").is_dir()


def test_a_damaged_graph_beside_the_checkpoint_is_made_again(
    run_cli: RunCli, tmp_path: Path, photographs: Path
) -> None:
    weights = tmp_path / "best.pt"
    save_checkpoint(weights, network(0))
    (tmp_path / "best.onnx").write_text("not a graph")
    code, _, err = run_cli("infer", "--weights", weights, "--source", photographs, "--project", tmp_path / "runs")
    assert code == 0, err
    assert "exporting again" in err


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(UsageError, match=r"folder\.pt: is not a file"):
        exported(tmp_path / "folder.pt", None)
    with pytest.raises(UsageError, match=r"none\.pt: there is no such file"):
        exported(tmp_path / "none.pt", None)
