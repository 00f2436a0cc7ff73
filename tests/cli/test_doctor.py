"""What `parkdet doctor` calls a problem."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from parkdet.cli import doctor

if TYPE_CHECKING:
    from tests.conftest import RunCli

GOOD = {"torch": "2.13.0+cpu", "onnxruntime": "1.32.0", "opencv-python-headless": "4.14.0.94"}


@pytest.mark.parametrize(
    "installed", [{}, GOOD, {"tensorrt-cu13": "10.16.1.11"}, {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}]
)
def test_libraries_that_go_together_are_no_problem(installed: dict[str, str]) -> None:
    assert doctor.library_problems(installed) == []


@pytest.mark.parametrize(
    ("more", "named", "remedy"),
    [
        ({"onnxruntime-gpu": "1.32.0"}, "onnxruntime-gpu", "pip uninstall -y onnxruntime onnxruntime-gpu"),
        ({"opencv-python": "4.14.0.94"}, "opencv-python ", "pip uninstall -y opencv-python,"),
        ({"opencv-contrib-python": "4.14.0"}, "opencv-contrib-python", "uninstall -y opencv-contrib-python,"),
        ({"torchvision": "0.28.0"}, "torchvision 0.28.0", "pip uninstall -y torchvision"),
        ({"tensorrt-cu12": "10.3.0"}, "tensorrt-cu12 10.3.0", "pip install 'tensorrt-cu12>=10.16'"),
    ],
)
def test_libraries_that_disturb_one_another(more: dict[str, str], named: str, remedy: str) -> None:
    (problem,) = doctor.library_problems({**GOOD, **more})
    assert named in problem.problem
    assert remedy in problem.remedy


def test_the_report_agrees_with_the_installation_and_the_system(run_cli: RunCli) -> None:
    _, out, err = run_cli("doctor", "--json")
    report = json.loads(out)

    assert err == ""
    assert report["installation"]["folder"] == str(Path(doctor.__file__).resolve().parents[1])
    import numpy as np

    assert report["installation"]["libraries"]["base"]["numpy"] == np.__version__
    assert report["machine"]["cpu_set"] == len(os.sched_getaffinity(0))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < report["machine"]["memory_bytes"] <= physical


@pytest.mark.parametrize("arguments", [("doctor",), ("doctor", "--json")])
def test_a_problem_is_told_with_its_remedy_and_exits_with_1(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(doctor, "examine_machine", lambda: (_machine(), []))
    monkeypatch.setattr(doctor, "installed_versions", lambda: {"onnxruntime": "1", "onnxruntime-gpu": "1"})
    code, out, _ = run_cli(*arguments)
    assert code == 1
    assert "overwrite each other's files" in out
    assert "pip uninstall -y onnxruntime" in out


def test_without_a_problem_it_says_so(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine_machine", lambda: (_machine(), []))
    monkeypatch.setattr(doctor, "library_problems", lambda _installed: [])
    code, out, _ = run_cli("doctor")
    assert code == 0
    assert out.endswith("no problem found\n")


def test_an_absent_base_library_is_a_problem() -> None:
    installed = doctor.installed_versions()
    del installed["polars"]
    (problem,) = doctor.base_problems(doctor.examine_installation(installed))
    assert problem.problem == "not installed: polars"


def test_a_driver_that_does_not_answer_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Driver/library version mismatch' >&2\nexit 18\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    machine, problems = doctor.examine_machine()
    assert machine.gpus == ()
    assert any("Driver/library version mismatch" in problem.problem for problem in problems)


def test_the_gpus_are_listed_as_the_driver_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Tesla T4, 580.1, 15360 MiB, 7.5'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    machine, problems = doctor.examine_machine()
    assert machine.gpus == ("Tesla T4, 580.1, 15360 MiB, 7.5",)
    assert not any("T4" in problem.problem for problem in problems)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("Tesla T4, 550.54.15, 15360 MiB, 7.5", ["Tesla T4: its driver 550.54.15 is for a CUDA before 13"]),
        ("Tesla P100-PCIE-16GB, 580.65.06, 16384 MiB, 6.0", ["Tesla P100-PCIE-16GB: compute capability 6.0"]),
        ("Tesla P100, 535.1, 16384 MiB, 6.0", ["its driver 535.1", "compute capability 6.0"]),
        ("NVIDIA H100, 590.1, [N/A], [N/A]", []),
        ("something else", []),
    ],
)
def test_a_gpu_or_driver_that_is_too_old_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, told: list[str]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _, problems = doctor._gpus()
    assert len(problems) == len(told)
    assert all(words in problem.problem for words, problem in zip(told, problems, strict=True))


def test_a_disk_that_is_nearly_full_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 2**60)
    _, problems = doctor.examine_machine()
    assert any(problem.problem.startswith(f"{tmp_path}: ") for problem in problems)


@pytest.mark.parametrize(("text", "cpus"), [("max 100000", None), ("150000 100000", 1.5), ("", None)])
def test_the_containers_share_of_the_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cpus: float | None
) -> None:
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(doctor, "_control_groups", lambda: [tmp_path])
    monkeypatch.setattr(doctor, "_read", lambda path: Path(path).read_text() if Path(path).parent == tmp_path else "")
    assert doctor._cpu_quota() == cpus


def _machine() -> doctor.Machine:
    return doctor.Machine(
        platform="test",
        cpu="test",
        cpu_set=1,
        cpu_quota=None,
        cpu_flags=(),
        memory_bytes=None,
        free_disk_bytes={},
        gpus=(),
    )
