"""Which lines of the plugin its tests run: all of them, or those named here with the reason."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_free.kernels.simulation import ROOT, compiler
from tests.gpu_free.plugin.plugin_build import PLUGIN, cuda_headers, tensorrt_headers

_NO_SUCH = "plan.h names no other kernels, and a test of it compares them with those that there are"
CORE: dict[str, dict[str, str]] = {
    "nms_core.cpp": {},
    "launch.cu": {'else trouble = "plan.h names a kernel that launch.cu does not know";': _NO_SUCH},
}
"""File -> text of a line that no test runs -> why. These need no TensorRT."""
ADAPTER: dict[str, dict[str, str]] = {"nms_plugin.cpp": {}, "entry.cpp": {}}
"""The same, of what is compiled where TensorRT's headers are."""
WITHOUT_CODE = {"nms_core.h", "nms_plugin.h"}
"""Declarations alone: gcov has nothing to say of them."""

Lines = dict[str, tuple[set[int], set[int]]]
"""File -> numbers of the lines that are code, and of those that were run."""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    """The plugin's tests in another process, by a compiler that counts."""
    gxx, gcov = compiler(), shutil.which("gcov")
    if gxx is None or gcov is None:
        pytest.skip("no g++ with gcov")
    folder = tmp_path_factory.mktemp("counted")
    counting = folder / "g++"
    counting.write_text(f'#!/bin/sh\nexec {shlex.quote(gxx)} --coverage "$@"\n')
    counting.chmod(0o755)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests.append(str(Path(__file__).with_name("test_plugin.py")))
    # Builds are kept in the folder of temporary files; these are of no use to others.
    environment = {**os.environ, "CXX": str(counting), "TMPDIR": str(folder)}
    ran = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    counts = [str(path) for path in folder.rglob("*.gcda")]
    command = [gcov, "--stdout", "--json-format", *counts]
    said = subprocess.run(command, cwd=Path(counts[0]).parent, capture_output=True, text=True, check=True)
    lines: Lines = {}
    for unit in map(json.loads, said.stdout.splitlines()):
        for file in unit["files"]:
            path = Path(unit["current_working_directory"], file["file"])
            if path.parent.resolve() == PLUGIN:
                code, run = lines.setdefault(path.name, (set(), set()))
                code |= {line["line_number"] for line in file["lines"]}
                run |= {line["line_number"] for line in file["lines"] if line["count"]}
    return lines


def check(counted: Lines, expected: dict[str, dict[str, str]]) -> None:
    """Print how many lines were run of each file, and the others with their reasons; fail if they are not those."""
    for name, unreached in expected.items():
        code, run = counted[name]
        print(f"\n{name}: {len(run)} of {len(code)} lines")
        for line, reason in unreached.items():
            print(f"    not run: {line}\n        {reason}")
        text = (PLUGIN / name).read_text().splitlines()
        assert {text[number - 1].strip() for number in code - run} == set(unreached), name


def test_every_line_of_the_core_is_run(counted: Lines) -> None:
    """The counts are printed: `./dev test tests/gpu_free/plugin/test_coverage.py -s`."""
    check(counted, CORE)
    assert not [name for name in WITHOUT_CODE if name in counted and counted[name][0]]


def test_every_line_of_the_adapter_is_run(counted: Lines) -> None:
    if tensorrt_headers() is None:
        pytest.skip("TENSORRT_INCLUDE_DIR names no folder with NvInferRuntime.h: the adapter's lines are not counted")
    if cuda_headers() is None:
        pytest.skip("CUDA's headers are not installed (CUDA_HOME): the adapter's lines are not counted")
    check(counted, ADAPTER)


def test_no_file_is_left_out() -> None:
    sources = {path.name for path in PLUGIN.iterdir() if path.suffix in (".cpp", ".cu", ".h")}
    assert sources == {*CORE, *ADAPTER, *WITHOUT_CODE}
