"""`parkdet bench`: figures that another count agrees with, and an answer to "will it be done in time"."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest

from parkdet.runtime.bench import PipelineSpeed
from parkdet.runtime.bench_report import forecast
from parkdet.runtime.flops import count_flops

RunCli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("shape", [(1, 32, 48), (3, 96, 64)])
def test_flops_are_those_of_the_convolutions(tiny_model: Any, tiny_onnx: Path, shape: tuple[int, int, int]) -> None:
    batch, height, width = shape
    channels = tiny_model.spec.anchors_per_cell * tiny_model.spec.num_outputs
    # A convolution that steps by its own size: every output is stride * stride * 3 multiply-adds.
    expected = sum(2 * channels * (height // s) * (width // s) * s * s * 3 for s in tiny_model.spec.strides)
    assert count_flops(tiny_onnx, shape) == batch * expected


def _speeds(*images_per_s: float) -> list[PipelineSpeed]:
    return [
        PipelineSpeed(plan=name, images=10, images_per_s=speed, bottleneck="model")
        for name, speed in zip("abc", images_per_s, strict=False)
    ]


def test_a_job_that_fits_is_done_by_the_best_plan() -> None:
    assert forecast(100, None, _speeds(2, 4)).plans == {"a": 100}
    job = forecast(100, 50, _speeds(2, 4))
    assert (job.plans, job.fits, job.seconds) == ({"a": 100}, True, 50)


def test_a_job_that_is_too_long_for_the_best_plan_is_shared_by_two() -> None:
    job = forecast(100, 40, _speeds(2, 4))
    assert job.fits
    assert sum(job.plans.values()) == 100
    assert job.plans["a"] / 2 + job.plans["b"] / 4 <= 40
    assert (job.plans["a"] + 1) / 2 + (job.plans["b"] - 1) / 4 > 40
    assert forecast(100, 20, _speeds(2, 4, 10)).plans.keys() == {"b", "c"}


def test_a_job_that_no_plan_does_in_time() -> None:
    job = forecast(100, 9, _speeds(2, 4, 10))
    assert (job.plans, job.fits) == ({}, False)


def test_figures_as_text_and_as_json(run_cli: RunCli, tiny_onnx: Path, tmp_path: Path) -> None:
    figures = tmp_path / "bench.json"
    code, out, err = run_cli(
        "bench", "--weights", tiny_onnx, "--vs", tiny_onnx, "--seconds", "0.1",
        "--batch-size", "1", "--batch-size", "2", "--images", "1000", "--deadline", "3h", "--json", figures,
    )  # fmt: skip
    assert code == 0, err
    for words in ("latency p50", "images/s", "bottleneck", "peak memory", "GFLOP an image", "in turn", "in 3:00:00"):
        assert words in out
    report = json.loads(figures.read_text())
    assert [row["batch"] for row in report["latency"]] == [1, 2]
    assert all(0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] for row in report["latency"])
    assert all(row["images_per_s"] > 0 for row in report["throughput"] + report["pipelines"])
    assert 0.3 < report["comparison"]["ratio"] < 3
    assert report["comparison"]["lowest"] <= report["comparison"]["ratio"] <= report["comparison"]["highest"]
    assert report["peak_memory_mb"] > 50
    assert report["forecast"]["fits"]
    assert sum(report["forecast"]["plans"].values()) == 1000


def test_a_job_that_will_be_late_exits_3(run_cli: RunCli, tiny_onnx: Path) -> None:
    code, out, err = run_cli(
        "bench", "--weights", tiny_onnx, "--seconds", "0.1", "--images", "100000000", "--deadline", "10s"
    )
    assert code == 3
    assert "not by any plan" in out
    assert "give more time or a smaller model" in err


def test_what_cannot_be_measured_is_a_usage_error(run_cli: RunCli, tiny_onnx: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (("--weights", tmp_path / "none.onnx"), "no such file"),
        (("--weights", tiny_onnx, "--deadline", "3h"), "--images"),
        (("--weights", tiny_onnx, "--images", "5", "--deadline", "soon"), "no time span"),
        (("--weights", tiny_onnx, "--tta"), "without test-time augmentation"),
        (("--weights", tiny_onnx, "--source", tmp_path, "--data", tmp_path), "not both"),
        (("--weights", tiny_onnx, "--vs", tmp_path / "none.onnx"), "no such file"),
        (("--weights", tiny_onnx, "--json", tmp_path / "nowhere/figures.json"), "--json"),
        (("--weights", tiny_onnx, "--json", tmp_path), "--json"),
    ):
        code, _, err = run_cli("bench", *arguments)
        assert (code, words in err) == (2, True), err
        assert "measuring" not in err


def test_unreadable_images_are_left_out_of_the_sample(
    run_cli: RunCli, tiny_onnx: Path, tmp_path: Path, picture: Callable[..., Any]
) -> None:
    for name, content in (("a.jpg", b"no image"), ("b.png", b"")):
        (tmp_path / name).write_bytes(content)
    code, _, err = run_cli("bench", "--weights", tiny_onnx, "--source", tmp_path, "--seconds", "0.1")
    assert code == 1
    assert "a.jpg: is not a PNG" in err
    cv2.imwrite(str(tmp_path / "c.png"), picture(60, 90))
    code, out, err = run_cli("bench", "--weights", tiny_onnx, "--source", tmp_path, "--seconds", "0.1")
    assert code == 0, err
    assert f"1 images of {tmp_path} (2 more could not be read)" in out


def test_two_artifacts_of_different_canvases_are_compared(
    run_cli: RunCli, tiny_model: Any, tiny_onnx: Path, tmp_path: Path
) -> None:
    fixed = tiny_model.save(tmp_path / "fixed.onnx", fixed=(2, 64, 96))
    for one, other in ((tiny_onnx, fixed), (fixed, tiny_onnx)):
        code, out, err = run_cli("bench", "--weights", one, "--vs", other, "--seconds", "0.1")
        assert code == 0, err
        assert f"times the images/s of {other}" in out


def test_a_full_disk_is_told_as_such(run_cli: RunCli, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:  # noqa: ARG001
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = run_cli("bench", "--weights", tiny_onnx, "--seconds", "0.1")
    assert (code, "the disk is full" in err) == (1, True), err
