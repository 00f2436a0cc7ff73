"""The kernels' binary: `python -m parkdet.runtime.cuda.fatbin` builds it, `read_fatbin` gives it to a loader.

It holds machine code for every architecture of ARCHITECTURES and PTX for those to come, and in each the hash of what
it was made of, so that a binary that no longer fits its sources is never loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from parkdet.runtime.errors import ArtifactError, ParkdetError, UsageError

FOLDER = Path(__file__).resolve().parent
FATBIN = FOLDER / "kernels.fatbin"
SOURCES = ("kernels.cu", "kernels.cuh", "letterbox.cuh", "nms.cuh", "parameters.h")
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
PTX_ARCHITECTURE = 75
OPTIONS = (
    "-std=c++17",
    "-O3",
    "-fmad=false",  # a fused multiply-add rounds once where the CPU rounds twice
    *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES),
    f"-gencode=arch=compute_{PTX_ARCHITECTURE},code=compute_{PTX_ARCHITECTURE}",
)
WHEELS = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)
"""What brings the nvcc that built the shipped binary: the same one makes the same bytes."""
REBUILD = "run 'python -m parkdet.runtime.cuda.fatbin' to build it"


def sources_digest(folder: Path = FOLDER) -> str:
    """SHA-256 of the sources, their names and the compiler's options."""
    digest = hashlib.sha256("\n".join(OPTIONS).encode())
    for name in SOURCES:
        text = (folder / name).read_bytes().replace(b"\r\n", b"\n")  # a checkout may have changed the line ends
        digest.update(f"\n{name} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def _mark(digest: str) -> bytes:
    return f"parkdet-sources:{digest}".encode()


def check_fatbin(binary: bytes, digest: str, where: Path) -> None:
    """ArtifactError unless the machine code of every architecture was made of the sources with this hash."""
    found = binary.count(_mark(digest) + b"\0")
    if found != len(ARCHITECTURES):
        raise ArtifactError(
            f"{where}: {found} of {len(ARCHITECTURES)} architectures in it are built from the kernels' sources "
            f"as they are; {REBUILD}"
        )


def read_fatbin() -> bytes:
    """The binary for `cuModuleLoadData` or `cuLibraryLoadData`. ArtifactError where it is missing or stale."""
    try:
        binary = FATBIN.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{FATBIN}: cannot be read ({error.strerror}); {REBUILD}") from error
    check_fatbin(binary, sources_digest(), FATBIN)
    return binary


def find_nvcc() -> Path | None:
    """nvcc: what NVCC names, else that of PATH, of CUDA_HOME, or of the wheels."""
    named = os.environ.get("NVCC")
    if named:
        found = shutil.which(named)
        if found is None:
            raise UsageError(f"NVCC names {named}, which is no program")
        return Path(found)
    wheels = importlib.util.find_spec("nvidia")
    folders = [
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin",
        *(Path(place) / "cu13/bin" for place in ((wheels and wheels.submodule_search_locations) or ())),
    ]
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(map(str, folders)))
    return Path(found) if found else None


def compile_fatbin(nvcc: Path, folder: Path = FOLDER) -> bytes:
    """Compile the sources of a folder for every architecture. ArtifactError with nvcc's words if it refuses."""
    digest = sources_digest(folder)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "kernels.fatbin"
        command = [
            str(nvcc), *OPTIONS, f'-DPARKDET_SOURCES="{digest}"', "-fatbin", "kernels.cu", "-o", str(output)
        ]  # fmt: skip
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode or not output.is_file():
            raise ArtifactError(f"{folder / 'kernels.cu'}: {nvcc} failed:\n{done.stderr or done.stdout}")
        binary = output.read_bytes()
    check_fatbin(binary, digest, output)
    return binary


@click.command()
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=FATBIN,
    show_default="beside the sources",
    help="Where to write it.",
)
@click.option("--check", is_flag=True, help="Only say whether the binary there fits the sources.")
def main(output: Path, check: bool) -> None:
    """Build the kernels' binary with nvcc, for every architecture."""
    from parkdet.runtime.shards import write_atomically

    if check:
        if not output.is_file():
            raise ArtifactError(f"{output}: there is no such file; {REBUILD}")
        check_fatbin(output.read_bytes(), sources_digest(), output)
    else:
        nvcc = find_nvcc()
        if nvcc is None:
            raise UsageError(
                "there is no nvcc (NVCC, PATH, CUDA_HOME). Install a CUDA toolkit of 12.8 or newer, or the wheels: "
                f"pip install {' '.join(WHEELS)}"
            )
        write_atomically(output, compile_fatbin(nvcc))
    click.echo(f"{output}: {output.stat().st_size:,} bytes, sources {sources_digest()[:12]}")


if __name__ == "__main__":
    try:
        main()
    except ParkdetError as problem:
        click.echo(f"error: {problem}", err=True)
        sys.exit(problem.exit_code)
