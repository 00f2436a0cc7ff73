"""The graphs and digests kept in the user's cache folder: never another answer, whatever becomes of the folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parkdet.runtime.backends import graph_cache, open_backend

Model = Any


def _canvases(shape: tuple[int, int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_a_graph_is_taken_from_the_cache_and_a_damaged_one_is_made_again(
    tiny_model: Model, random_tiny_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tiny_model.save(tmp_path / "a.onnx")
    heads = []

    def run(path: Path = path, shape: tuple[int, int, int] = (1, 32, 48)) -> None:
        with open_backend(path, "openvino") as backend:
            heads.append(backend.infer(_canvases(shape))[0])

    run()
    (kept,) = graph_cache.cache_folder().iterdir()
    first = kept.stat().st_mtime_ns
    weights, sound = kept / "graph.bin", (kept / "graph.bin").read_bytes()
    stored: list[object] = []
    real = graph_cache.GraphCache.store

    def store(cache: graph_cache.GraphCache, model: Any) -> None:
        stored.append(model)
        real(cache, model)

    monkeypatch.setattr(graph_cache.GraphCache, "store", store)
    run()
    run(shape=(2, 64, 48))
    del heads[-1]
    assert not stored
    assert kept.stat().st_mtime_ns > first  # the least recently used goes first
    for damage in (sound[:-7], b"", sound[:-1] + b"x", bytes(len(sound))):
        weights.write_bytes(damage)
        run()
        assert stored.pop()
        assert [*graph_cache.cache_folder().iterdir()] == [kept]
        assert weights.read_bytes() == sound
    for file in ("graph.xml", "graph.bin", "checksum"):
        (kept / file).unlink()
        run()
        assert stored.pop()
    for head in heads[1:]:
        np.testing.assert_array_equal(head, heads[0])
    # The plain graph, without any cache, computes the same.
    monkeypatch.setattr(graph_cache.GraphCache, "load", lambda _cache, _core: None)
    run()
    np.testing.assert_array_equal(heads.pop(), heads[0])
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    size = sum(file.stat().st_size for file in kept.iterdir())
    monkeypatch.setattr(graph_cache, "MAX_BYTES", 3 * size + size // 2)
    (graph_cache.cache_folder() / "of-before.compiled").write_bytes(bytes(size))
    os.utime(graph_cache.cache_folder() / "of-before.compiled", ns=(0, 0))
    for seed in (5, 6, 7):
        run(random_tiny_model(seed=seed).save(tmp_path / f"{seed}.onnx"))
    assert len([*graph_cache.cache_folder().iterdir()]) == 3
    assert not kept.exists()


def test_the_digest_of_a_large_file_is_noted_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(graph_cache, "_LARGE_BYTES", 4)
    file, read = tmp_path / "a.onnx", []
    real = hashlib.file_digest

    def file_digest(content: Any, name: str) -> Any:
        read.append(content.name)
        return real(content, name)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)

    def digest_in_another_process() -> str:
        graph_cache._file_digest.cache_clear()
        return graph_cache.artifact_digest(file)

    def expected() -> str:
        return hashlib.sha256(hashlib.sha256(file.read_bytes()).digest()).hexdigest()

    file.write_bytes(b"weights of one")
    status = file.stat()
    # Written this moment, it may change again within one step of the clock.
    assert digest_in_another_process() == digest_in_another_process() == expected()
    assert len(read) == 2
    monkeypatch.setattr(graph_cache, "_YOUNG_NS", 0)
    assert digest_in_another_process() == digest_in_another_process() == expected()
    assert len(read) == 3
    file.write_bytes(b"weights of two")  # of the same size, and with the time of the first
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest_in_another_process() == expected()
    assert len(read) == 4
    (note,) = graph_cache.cache_folder().iterdir()
    noted = note.read_text()
    for damage in ("", "zz", noted[1:], noted.replace(noted[:64], "zz" * 32), noted[:60]):
        note.write_text(damage)
        assert digest_in_another_process() == expected()


def test_a_cache_that_cannot_be_written_is_done_without(
    tiny_model: Model, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    canvases = _canvases((1, 32, 48))
    with open_backend(tiny_onnx, "openvino", precision="fp32") as backend:
        np.testing.assert_allclose(backend.infer(canvases)[0], tiny_model.heads(canvases)[0], atol=1e-4)
