"""Compiled graphs kept in the user's cache folder, so that a graph is read and optimised once a machine.

Several processes may use it at once: a file is written under a name of its own and renamed, and what is removed
while another process reads it stays readable to that one. Losing any of it costs time only.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

MAX_BYTES = 4_000_000_000
"""Kept in all; the least recently used go first. A YOLOv5x6 takes 0.6 GB for every canvas size."""

_SUFFIX = ".compiled"
_CHECKSUM_BYTES = 4


class CompiledCache:
    """The compiled forms of one artifact. A folder that cannot be used is no error: nothing is found in it."""

    def __init__(self, digest: str, folder: Path | None = None) -> None:
        """`digest`: SHA-256 of the artifact. `folder`: another one than the user's cache folder."""
        self.folder = folder or cache_folder()
        self._digest = digest

    def knows(self) -> bool:
        """Whether this artifact was compiled before, for any canvas and settings."""
        try:
            return any(name.startswith(self._digest[:16]) for name in os.listdir(self.folder))  # noqa: PTH208 - names
        except OSError:
            return False

    def load(self, key: Mapping[str, Any]) -> bytes | None:
        """What `store` kept under this key, checked; None where there is nothing sound."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                checksum, blob = file.read(_CHECKSUM_BYTES), file.read()
        except OSError:
            return None
        if checksum != _checksum(blob):
            self.forget(key)
            return None
        with suppress(OSError):
            os.utime(path)
        return blob

    def store(self, key: Mapping[str, Any], blob: bytes) -> None:
        """Keep a compiled graph. Nothing happens where the folder cannot be written or is full."""
        if len(blob) > MAX_BYTES // 2:
            return
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._make_room(len(blob))
            descriptor, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            with os.fdopen(descriptor, "wb") as file:
                file.write(_checksum(blob))
                file.write(blob)
            Path(temporary).replace(self._path(key))
        except OSError:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def forget(self, key: Mapping[str, Any]) -> None:
        """Remove what is kept under this key."""
        with suppress(OSError):
            self._path(key).unlink()

    def _path(self, key: Mapping[str, Any]) -> Path:
        text = json.dumps({"artifact": self._digest, **key}, sort_keys=True, default=str)
        return self.folder / f"{self._digest[:16]}-{hashlib.sha256(text.encode()).hexdigest()[:24]}{_SUFFIX}"

    def _make_room(self, wanted: int) -> None:
        files = []
        for entry in os.scandir(self.folder):
            with suppress(OSError):  # another process removed it
                status = entry.stat()
                files.append((status.st_mtime, status.st_size, entry.path))
        total = wanted + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= MAX_BYTES:
                break
            with suppress(OSError):
                Path(path).unlink()
            total -= size


def _checksum(blob: bytes) -> bytes:
    return zlib.crc32(blob).to_bytes(_CHECKSUM_BYTES, "big")


def cache_folder() -> Path:
    """`parkdet/openvino` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")  # noqa: PTH111, PTH118
    return Path(base) / "parkdet" / "openvino"


def artifact_digest(path: Path) -> str:
    """SHA-256 of an artifact's content: the file, with the .bin of an OpenVINO .xml, or the engines of a folder."""
    files = [path, path.with_suffix(".bin")] if path.suffix.lower() == ".xml" else [path]
    if path.is_dir():
        files = sorted(path.glob("*.engine"))
    total = hashlib.sha256()
    for file in files:
        if file.is_file():
            status = file.stat()
            total.update(_file_digest(str(file), status.st_size, status.st_mtime_ns))
    return total.hexdigest()


@lru_cache(maxsize=16)
def _file_digest(path: str, _size: int, _mtime_ns: int) -> bytes:
    """A file's SHA-256, computed once while its size and time stay."""
    with open(path, "rb") as content:  # noqa: PTH123 - the cache's key is text
        return hashlib.file_digest(content, "sha256").digest()
