"""`infer --executor ray` on a local cluster: the files of one process, also when a worker is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest

from parkdet.runtime.geometry import ImageArray
from parkdet.runtime.inference_report import REPORT_FILE
from parkdet.runtime.store import RunStore, covered_images, read_predictions

RunCli = Callable[..., tuple[int, str, str]]
IMAGES = 24


@pytest.fixture
def photographs(tmp_path: Path, picture: Callable[..., ImageArray]) -> Path:
    folder = tmp_path / "사진"
    folder.mkdir()
    for index in range(IMAGES):
        cv2.imencode(".png", picture(60 + index % 3, 90, index))[1].tofile(folder / f"{index:02d}.png")
    (folder / "zero.png").touch()
    return folder


def test_without_ray_the_message_says_how_to_get_it(
    run_cli: RunCli, tiny_onnx: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parkdet.runtime.ray_executor.find_spec", lambda _: None)
    code, _, err = run_cli(
        "infer", "--weights", tiny_onnx, "--source", photographs, "--project", tmp_path, "--executor", "ray"
    )
    assert code == 2
    assert "pip install 'parkdet[ray]'" in err


@pytest.mark.parametrize("option", ["--workers", "--address"])
def test_options_of_ray_need_it(run_cli: RunCli, tiny_onnx: Path, photographs: Path, option: str) -> None:
    code, _, err = run_cli("infer", "--weights", tiny_onnx, "--source", photographs, option, "2")
    assert code == 2
    assert "--executor ray" in err


@pytest.mark.slow
def test_a_killed_workers_images_are_done_by_another(
    run_cli: RunCli, tiny_onnx: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'parkdet[ray]'")
    command = ("infer", "--weights", tiny_onnx, "--source", photographs, "--project", tmp_path / "runs")
    assert run_cli(*command, "--name", "alone")[0] == 1  # zero.png
    killed: list[int] = []
    write = RunStore.write

    def write_and_kill(store: RunStore, *arguments: Any, **named: Any) -> Path:
        if not killed:  # one shard is there, others are under way
            killed.extend(_workers()[:1])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        return write(store, *arguments, **named)

    monkeypatch.setattr(RunStore, "write", write_and_kill)
    code, out, err = run_cli(*command, "--name", "cluster", "--executor", "ray", "--workers", "2")
    assert killed, "no worker was found to kill"
    assert code == 1, err
    assert f"{IMAGES} of {IMAGES + 1} with a result, 1 could not be read" in out
    assert read_predictions(tmp_path / "runs/cluster").equals(read_predictions(tmp_path / "runs/alone"))
    assert covered_images(tmp_path / "runs/cluster") == covered_images(tmp_path / "runs/alone")
    report = json.loads((tmp_path / "runs/cluster" / REPORT_FILE).read_text())
    assert report["this_run"]["done"] == IMAGES
    deadline = time.monotonic() + 20
    while _workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _workers()
    assert threading.active_count() < 50


def _workers() -> list[int]:
    """Processes of this user that are our actors, by the title that Ray gives them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::ShardWorker"):
                found.append(int(entry.name))
    return sorted(found)
