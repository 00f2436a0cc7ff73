"""The shipped binary: made of these sources, complete, small, and within what the kernels may use of a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from parkdet.runtime.cuda import fatbin
from parkdet.runtime.errors import ArtifactError
from tests.gpu_free.kernels.cubins import Cubin, Kernel, cubins, ptx_architectures
from tests.gpu_free.kernels.simulation import KERNELS

THREADS = {"reset": 256, "collect": 256, "select": 256, "sort": 1024, "rank": 1024, "suppress": 1024, "letterbox": 256}
"""Entry -> threads of a block, as README and plan say."""


@pytest.fixture(scope="module")
def shipped() -> bytes:
    return fatbin.read_fatbin()


def test_the_binary_is_made_of_these_sources(shipped: bytes) -> None:
    assert len(shipped) < 1_000_000
    fatbin.check_fatbin(shipped, fatbin.sources_digest(), fatbin.FATBIN)


def test_every_file_that_the_binary_includes_is_hashed() -> None:
    to_read, included = ["kernels.cu"], set()
    while to_read:
        name = to_read.pop()
        included.add(name)
        to_read += re.findall(r'^#include "(.+)"', (KERNELS / name).read_text(), re.MULTILINE)
    assert included == set(fatbin.SOURCES)


@pytest.mark.parametrize("change", ["nms.cuh", "parameters.h"])
def test_a_binary_of_other_sources_is_refused(shipped: bytes, change: str, tmp_path: Path) -> None:
    for name in fatbin.SOURCES:
        shutil.copy(KERNELS / name, tmp_path)
    assert fatbin.sources_digest(tmp_path) == fatbin.sources_digest()
    with (tmp_path / change).open("a") as file:
        file.write("// another\n")
    with pytest.raises(ArtifactError, match=r"0 of 7 architectures .*python -m parkdet.runtime.cuda.fatbin"):
        fatbin.check_fatbin(shipped, fatbin.sources_digest(tmp_path), fatbin.FATBIN)


def test_one_stale_architecture_is_refused(shipped: bytes) -> None:
    digest = fatbin.sources_digest().encode()
    damaged = shipped.replace(digest, digest[::-1], 1)
    with pytest.raises(ArtifactError, match="6 of 7"):
        fatbin.check_fatbin(damaged, fatbin.sources_digest(), fatbin.FATBIN)


def test_every_architecture_and_ptx_are_there(shipped: bytes) -> None:
    assert [cubin.architecture for cubin in cubins(shipped)] == list(fatbin.ARCHITECTURES)
    assert ptx_architectures(shipped) == [75]


@pytest.mark.parametrize("index", range(len(fatbin.ARCHITECTURES)), ids=[f"sm_{a}" for a in fatbin.ARCHITECTURES])
def test_contract(shipped: bytes, index: int) -> None:
    """The entries, no local memory, and two blocks of 1024 threads a multiprocessor that holds 65,536 registers."""
    cubin = cubins(shipped)[index]
    assert {name.removeprefix("parkdet_") for name in cubin.kernels} == set(THREADS)
    for name, kernel in cubin.kernels.items():
        assert (kernel.stack, kernel.local) == (0, 0), name
        threads = THREADS[name.removeprefix("parkdet_")]
        assert kernel.registers <= (32 if threads == 1024 else 64), name
        assert kernel.shared <= 16384 + 1024, name


def _nvcc() -> Path:
    nvcc = fatbin.find_nvcc()
    if nvcc is None:
        pytest.skip(f"no nvcc; pip install {' '.join(fatbin.WHEELS)} brings one")
    return nvcc


def test_the_reader_sees_stacks_and_local_memory(tmp_path: Path) -> None:
    """What the contract rests on: code that does use local memory is found out."""
    (tmp_path / "spill.cu").write_text(
        'extern "C" __global__ void spills(int* out, int n) {\n'
        "    int table[64] = {};\n"
        "    for (int i = 0; i < n; ++i) table[out[i] & 63] += i;\n"
        "    *out = table[n];\n"
        "}\n"
    )
    command = [str(_nvcc()), "-fatbin", "-gencode=arch=compute_86,code=sm_86", "spill.cu", "-o", "spill.fatbin"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (cubin,) = cubins((tmp_path / "spill.fatbin").read_bytes())
    assert cubin.kernels["spills"].stack >= 256


@pytest.mark.slow
def test_the_same_nvcc_makes_the_same_bytes(shipped: bytes) -> None:
    nvcc = _nvcc()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    if "V13.0.88" not in version:
        pytest.skip(f"the shipped binary is of nvcc 13.0.88, this is {version.splitlines()[-1]}")
    assert fatbin.compile_fatbin(nvcc) == shipped


def test_the_reader_agrees_with_cuobjdump(shipped: bytes) -> None:
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(_nvcc().resolve().parent))
    if tool is None:
        pytest.skip("no cuobjdump; pip install nvidia-cuda-cuobjdump brings one")
    text = subprocess.run([tool, "-res-usage", fatbin.FATBIN], capture_output=True, text=True, check=True).stdout
    found: list[Cubin] = []
    for block in text.split("arch = sm_")[1:]:
        usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", block)
        if usage:
            kernels = {
                name: Kernel(int(registers), int(stack), int(local), int(shared))
                for name, registers, stack, shared, local in usage
            }
            found.append(Cubin(int(block.split()[0]), kernels))
    assert found == cubins(shipped)
    assert "Fatbin ptx code" in text


def test_a_missing_binary_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fatbin, "FATBIN", tmp_path / "kernels.fatbin")
    with pytest.raises(ArtifactError, match=r"No such file .*python -m parkdet.runtime.cuda.fatbin"):
        fatbin.read_fatbin()


def test_what_nvcc_says_is_passed_on(tmp_path: Path) -> None:
    for name in fatbin.SOURCES:
        shutil.copy(KERNELS / name, tmp_path)
    (tmp_path / "nms.cuh").write_text("#error out of order\n")
    with pytest.raises(ArtifactError, match="out of order"):
        fatbin.compile_fatbin(_nvcc(), tmp_path)
