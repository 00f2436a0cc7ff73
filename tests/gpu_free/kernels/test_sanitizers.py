"""The kernels under the address, undefined-behaviour and thread sanitizers: no byte out of bounds, no race."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu_free.kernels.case_file import write_cases
from tests.gpu_free.kernels.cases import all_cases, letterbox_cases, thread_cases
from tests.gpu_free.kernels.simulation import case_runner, compiler, run_cases

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no g++ (or what CXX names)"),
    pytest.mark.timeout(1200),
]


def test_every_case_in_memory_of_its_own(tmp_path: Path) -> None:
    """Through plan.h, without Python: what the plugin does."""
    write_cases(tmp_path / "cases", all_cases())
    assert not run_cases(case_runner(), tmp_path / "cases", 60)


def test_a_wrong_result_is_reported(tmp_path: Path) -> None:
    """What the test above and the mutants rest on."""
    cases = list(letterbox_cases())[:1]
    write_cases(tmp_path / "cases", cases)
    content = bytearray((tmp_path / "cases").read_bytes())
    content[-1] ^= 1
    (tmp_path / "cases").write_bytes(content)
    assert run_cases(case_runner(), tmp_path / "cases", 60) == f"{cases[0].name}: canvas"


@pytest.mark.slow
def test_address_and_undefined_behaviour(tmp_path: Path) -> None:
    write_cases(tmp_path / "cases", all_cases())
    assert not run_cases(case_runner(sanitizer="address"), tmp_path / "cases", 200)


@pytest.mark.slow
def test_threads(tmp_path: Path) -> None:
    """Two CUDA threads on one address without a barrier between them are a race, though one processor runs both."""
    write_cases(tmp_path / "cases", list(thread_cases()))
    assert not run_cases(case_runner(sanitizer="thread"), tmp_path / "cases", 400)
