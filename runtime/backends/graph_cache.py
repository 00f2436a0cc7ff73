"""Graphs kept in the user's cache folder in OpenVINO's own form, which is mapped into memory where ONNX is parsed.

Opening a YOLOv5x6 from ONNX copies half a gigabyte twice; its mapped form opens at once, and serves every canvas
and precision. Several processes may use the folder at once: a graph is written under a name of its own and renamed,
and what is removed while another process has it mapped stays readable to that one. Losing any of it costs time only.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import tempfile
import time
import zlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino

MAX_BYTES = 4_000_000_000
"""Kept in all; the least recently used go first. A YOLOv5x6 takes 0.6 GB."""

_GRAPH, _WEIGHTS, _CHECKSUM = "graph.xml", "graph.bin", "checksum"
_LARGE_BYTES = 50_000_000
"""From here on a file's digest is noted for the next process: reading half a gigabyte from a disk takes seconds."""
_YOUNG_NS = 2_000_000_000
"""A file that changes twice within a step of its file system's clock shows one time, so none so young is noted."""


class GraphCache:
    """Where one artifact's graph is kept. A folder that cannot be used is no error: nothing is found in it."""

    def __init__(self, digest: str, folder: Path | None = None) -> None:
        """`digest`: SHA-256 of the artifact. `folder`: another one than the user's cache folder."""
        import openvino as ov

        self.folder = folder or cache_folder()
        version = hashlib.sha256(ov.get_version().encode()).hexdigest()
        self.place = self.folder / f"{digest[:32]}-{version[:8]}"

    def load(self, core: openvino.Core) -> openvino.Model | None:
        """What `store` kept, its weights mapped, after a check that it is whole; None where there is nothing sound."""
        try:
            kept = (self.place / _CHECKSUM).read_text()
            with suppress(OSError):  # a folder that may only be read
                os.utime(self.place)
            if kept == _checksum(self.place):
                return core.read_model(self.place / _GRAPH)
        except FileNotFoundError:
            if not self.place.exists():
                return None
        except (OSError, ValueError, RuntimeError):
            pass
        shutil.rmtree(self.place, ignore_errors=True)
        return None

    def store(self, model: openvino.Model) -> None:
        """Keep a graph. Nothing happens where the folder cannot be written or is full."""
        import openvino as ov

        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = Path(tempfile.mkdtemp(dir=self.folder, suffix=".tmp"))
            ov.save_model(model, temporary / _GRAPH, compress_to_fp16=False)
            (temporary / _CHECKSUM).write_text(_checksum(temporary))
            if _bytes_of(temporary) <= MAX_BYTES // 2:
                self._make_room(temporary)
                temporary.rename(self.place)
        except (OSError, ValueError, RuntimeError):
            pass  # another process was first, or there is no room
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)

    def _make_room(self, newcomer: Path) -> None:
        """Remove what was used least recently until the newcomer fits."""
        kept = []
        for entry in self.folder.iterdir():
            with suppress(OSError):  # another process removed it
                if entry != newcomer:
                    kept.append((entry.stat().st_mtime, _bytes_of(entry), entry))
        total = _bytes_of(newcomer) + sum(size for _, size, _ in kept)
        for _, size, entry in sorted(kept):
            if total <= MAX_BYTES:
                break
            with suppress(OSError):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            total -= size


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
            total.update(_file_digest(str(file.resolve()), _identity(file)))
    return total.hexdigest()


@lru_cache(maxsize=16)
def _file_digest(path: str, identity: tuple[int, ...]) -> bytes:
    """A file's SHA-256, computed once while its identity stays; of a large one once a machine."""
    note = cache_folder() / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.digest"
    with suppress(OSError, ValueError):
        noted, *of = note.read_text().split()
        if of == [*map(str, identity)] and len(noted) == 2 * hashlib.sha256().digest_size:
            return bytes.fromhex(noted)
    with open(path, "rb") as content:  # noqa: PTH123 - the cache's key is text
        digest = hashlib.file_digest(content, "sha256").digest()
    _note(note, Path(path), identity, digest)
    return digest


def _identity(file: Path) -> tuple[int, ...]:
    """What no change of a file's content leaves alike, as git has it: its time of change cannot be set by hand."""
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _note(note: Path, file: Path, identity: tuple[int, ...], digest: bytes) -> None:
    with suppress(OSError):
        size, changed = identity[2], identity[4]
        if size < _LARGE_BYTES or time.time_ns() - changed < _YOUNG_NS or _identity(file) != identity:
            return
        note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(dir=note.parent, suffix=".tmp")
        with os.fdopen(descriptor, "w") as text:
            text.write(" ".join((digest.hex(), *map(str, identity))))
        Path(temporary).replace(note)


def _checksum(folder: Path) -> str:
    """Of both of a graph's files; ValueError for an empty one."""
    total = 0
    for name in (_GRAPH, _WEIGHTS):
        with (folder / name).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            total = zlib.crc32(content, total)
    return f"{total:08x}"


def _bytes_of(entry: Path) -> int:
    """Of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in (entry.iterdir() if entry.is_dir() else (entry,)))
