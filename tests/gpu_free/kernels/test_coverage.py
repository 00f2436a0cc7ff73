"""Which lines of the device code the cases run: all of them, or those named here with the reason."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.gpu_free.kernels.case_file import write_cases
from tests.gpu_free.kernels.cases import all_cases
from tests.gpu_free.kernels.simulation import FLAGS, HERE, KERNELS, SHIM, compiler, scheduler_object

UNREACHED: dict[str, dict[str, str]] = {"nms.cuh": {}, "letterbox.cuh": {}, "plan.h": {}}
"""File -> text of a line that no case runs -> why."""


@pytest.mark.skipif(compiler() is None or shutil.which("gcov") is None, reason="no g++ with gcov")
def test_every_line_is_run(tmp_path: Path) -> None:
    """The counts are printed: `./dev test tests/gpu_free/kernels/test_coverage.py -s`."""
    write_cases(tmp_path / "cases", all_cases())

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    gxx = compiler()
    assert gxx is not None
    include = (f"-I{SHIM}", f"-I{KERNELS}")
    units = ("device_code", "run_cases")
    for unit in units:
        run(gxx, *FLAGS, "-O0", "--coverage", *include, "-c", HERE / f"{unit}.cpp", "-o", f"{unit}.o")
    run(gxx, "--coverage", *(f"{unit}.o" for unit in units), scheduler_object(), "-o", "run_cases")
    run("./run_cases", "cases", "200")
    said = [json.loads(run("gcov", "--stdout", "--json-format", f"{unit}.gcda")) for unit in units]
    for file in [file for unit in said for file in unit["files"]]:
        name = Path(file["file"]).name
        if name not in UNREACHED:
            continue
        lines = (KERNELS / name).read_text().splitlines()
        code = {line["line_number"] for line in file["lines"]}
        reached = {line["line_number"] for line in file["lines"] if line["count"]}
        print(f"\n{name}: {len(reached)} of {len(code)} lines", end="")
        assert {lines[number - 1].strip() for number in code - reached} == set(UNREACHED.pop(name))
    assert not UNREACHED, "gcov says nothing of these"
