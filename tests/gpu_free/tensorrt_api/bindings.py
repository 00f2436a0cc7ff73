"""The real Python bindings of TensorRT 10.16 and 11, made to import where TensorRT itself is not installed.

The wheels `tensorrt-cu13-bindings` hold only the bindings; the three libraries that they load come from elsewhere.
Stubs that export what the dynamic linker asks for let them import, which is enough to read every signature.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

DISTRIBUTION = "tensorrt-cu13-bindings"
VERSIONS = {"10": "10.16.1.11", "11": "11.4.0.106"}
"""Major version -> the release whose bindings are on record here."""

_STUBS = {
    "nvinfer": (
        "void *createInferBuilder_INTERNAL(void *logger, int version) { return 0; }\n"
        "void *createInferRefitter_INTERNAL(void *engine, void *logger, int version) { return 0; }\n"
        "void *createInferRuntime_INTERNAL(void *logger, int version) { return 0; }\n"
        "void *getPluginRegistry(void) { return 0; }\n"
        "void *getBuilderPluginRegistry(int capability) { return 0; }\n"
    ),
    "nvinfer_plugin": "_Bool initLibNvInferPlugins(void *logger, const char *space) { return 1; }\n",
    "nvonnxparser": (
        "void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { return 0; }\n"
        "void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { return 0; }\n"
        "int getNvOnnxParserVersion(void) { return 0; }\n"
    ),
}


class BindingsUnavailableError(Exception):
    """Why the bindings cannot be had here."""


@dataclass(frozen=True, slots=True)
class Bindings:
    """Unpacked bindings of one version and the stubs that they load."""

    packages: Path
    libraries: Path

    def run(self, *arguments: str) -> str:
        """What a Python program prints in whose environment `tensorrt_bindings.tensorrt` imports."""
        environment = os.environ | {"PYTHONPATH": str(self.packages), "LD_LIBRARY_PATH": str(self.libraries)}
        return subprocess.run(
            [sys.executable, "-W", "ignore", *arguments], env=environment, capture_output=True, text=True, check=True,
            timeout=120,
        ).stdout  # fmt: skip


def fetch(major: str, folder: Path) -> Bindings:
    """The recorded bindings of one major version over stubs. BindingsUnavailableError says why not."""
    if shutil.which("gcc") is None:
        raise BindingsUnavailableError("gcc is not installed; it compiles the stubs that the bindings load")
    packages = unpacked(VERSIONS[major], folder)
    libraries = folder / VERSIONS[major] / "libraries"
    libraries.mkdir(parents=True, exist_ok=True)
    for name, source in _STUBS.items():
        library = f"lib{name}.so.{major}"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{library}", "-o", str(libraries / library)],
            input=source, text=True, check=True, timeout=60,
        )  # fmt: skip
    return Bindings(packages, libraries)


def unpacked(version: str, folder: Path) -> Path:
    """The packages of one release, downloaded by pip once, `tensorrt` among them. BindingsUnavailableError."""
    packages, wheels = folder / version / "packages", folder / version / "wheels"
    if not (packages / "tensorrt").is_dir():
        wanted = f"{DISTRIBUTION}=={version}"
        command = ["-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1", "--dest", str(wheels), wanted]
        download = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=False, timeout=240
        )  # fmt: skip
        if download.returncode:
            raise BindingsUnavailableError(f"pip cannot get {wanted}: {download.stderr.strip()}")
        for wheel in wheels.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(packages)
        # What the distribution `tensorrt-cu13` brings beside the bindings.
        (packages / "tensorrt").mkdir()
        (packages / "tensorrt" / "__init__.py").write_text(
            "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
        )
    return packages
