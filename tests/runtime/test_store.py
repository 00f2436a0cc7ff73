"""Shards: whole or not at all, each image once, one run a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parkdet.runtime.errors import ArtifactError, InUseError, ParkdetError, UsageError
from parkdet.runtime.shards import SHARD_KEY, CapCounts, FailedImage, ImageResult
from parkdet.runtime.store import (
    RunStore,
    covered_images,
    failed_images,
    read_fingerprint,
    read_predictions,
)

FINGERPRINT: dict[str, str | int | float | bool] = {
    "model": "a" * 64,
    "conf": 0.01,
    "max_det": 50,
    "agnostic": False,
    "image_list": "b" * 64,
}


def _result(image_id: int, count: int) -> ImageResult:
    rng = np.random.default_rng(image_id)
    return ImageResult(
        image_id=image_id,
        file_bytes=1000 + image_id,
        xywh=rng.uniform(0, 100, (count, 4)).astype(np.float32),
        scores=np.sort(rng.uniform(0, 1, count).astype(np.float32))[::-1].copy(),
        category_ids=rng.integers(1, 15, count).astype(np.int32),
    )


def _shards(run: Path) -> list[Path]:
    return sorted((run / "predictions").glob("part-*.parquet"))


def test_an_empty_folder_has_no_predictions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read_predictions(tmp_path / "none")
    with pytest.raises(UsageError, match="parkdet infer"):
        read_predictions(tmp_path)
    assert read_fingerprint(tmp_path) is None
    with RunStore(tmp_path, FINGERPRINT) as store:
        assert (store.covered, store.failed, store.detections, store.messages) == (set(), [], 0, [])
    assert read_fingerprint(tmp_path) == FINGERPRINT


def test_what_is_written_is_read_back_in_the_order_of_image_ids(tmp_path: Path) -> None:
    results = {i: _result(i, n) for i, n in ((7, 3), (2, 0), (9, 1), (1, 4))}
    bad = FailedImage(image_id=5, file_name="가 나.png", reason="has zero bytes")
    with RunStore(tmp_path, FINGERPRINT) as store:
        store.write([results[7], results[2]], [], CapCounts(over_limit=2, at_max_det=1))
        store.write([results[9], results[1]], [bad], CapCounts(without_area=5))
        assert store.caps == CapCounts(over_limit=2, at_max_det=1, without_area=5)
        assert store.detections == 8
    frame = read_predictions(tmp_path)
    assert [(name, str(dtype)) for name, dtype in frame.schema.items()] == [
        ("image_id", "Int64"), ("category_id", "Int32"), *((c, "Float32") for c in ("x", "y", "w", "h", "score")),
    ]  # fmt: skip
    ordered = [results[i] for i in (1, 7, 9)]
    assert frame["image_id"].to_list() == [1] * 4 + [7] * 3 + [9]
    np.testing.assert_array_equal(
        frame.select("x", "y", "w", "h").to_numpy(), np.concatenate([r.xywh for r in ordered])
    )
    np.testing.assert_array_equal(frame["score"].to_numpy(), np.concatenate([r.scores for r in ordered]))
    np.testing.assert_array_equal(frame["category_id"].to_numpy(), np.concatenate([r.category_ids for r in ordered]))
    assert covered_images(tmp_path) == {1, 2, 7, 9}
    assert failed_images(tmp_path) == [bad]
    assert read_predictions(tmp_path / "predictions").equals(frame)


def test_the_metadata_of_a_shard_tells_what_it_covers(tmp_path: Path) -> None:
    with RunStore(tmp_path, FINGERPRINT) as store:
        path = store.write([_result(3, 0)], [FailedImage(image_id=4, file_name="x.png", reason="r")])
    metadata = json.loads(pq.read_schema(path).metadata[SHARD_KEY.encode()])
    assert metadata["covered"] == [3]
    assert metadata["failed"] == [{"image_id": 4, "file_name": "x.png", "reason": "r"}]
    assert metadata["fingerprint"] == FINGERPRINT


def test_an_image_that_is_read_at_last_is_no_failure_any_more(tmp_path: Path) -> None:
    bad = FailedImage(image_id=4, file_name="x.png", reason="r")
    with RunStore(tmp_path, FINGERPRINT) as store:
        store.write([_result(3, 1)], [bad])
        assert store.failed == [bad]
        store.write([_result(4, 1)], [])
        assert store.failed == []
    assert failed_images(tmp_path) == []


def test_an_image_is_not_stored_twice(tmp_path: Path) -> None:
    with RunStore(tmp_path, FINGERPRINT) as store:
        store.write([_result(1, 1)], [])
        for again in ([_result(1, 1)], [_result(2, 1), _result(2, 1)]):
            with pytest.raises(ValueError, match="twice"):
                store.write(again, [])


@pytest.mark.parametrize("harm", ["truncate", "empty", "flip", "other parquet", "text"])
def test_a_broken_shard_is_named_when_read_and_removed_when_the_run_goes_on(tmp_path: Path, harm: str) -> None:
    with RunStore(tmp_path, FINGERPRINT) as store:
        store.write([_result(1, 200)], [])
        path = store.write([_result(2, 200)], [])
    content = path.read_bytes()
    if harm == "other parquet":
        pq.write_table(pa.table({"image_id": [2]}), path)
    else:
        flipped = bytearray(content)
        flipped[600] ^= 0xFF
        path.write_bytes({"truncate": content[:-20], "empty": b"", "flip": bytes(flipped), "text": b"hello" * 99}[harm])
    with pytest.raises(ArtifactError, match=r"part-00001\.parquet"):
        read_predictions(tmp_path)
    with RunStore(tmp_path, FINGERPRINT) as store:
        assert store.covered == {1}
        assert len(store.messages) == 1
        assert str(path) in store.messages[0]
        store.write([_result(2, 200)], [])
    assert covered_images(tmp_path) == {1, 2}
    assert len(read_predictions(tmp_path)) == 400


@pytest.mark.parametrize("size", range(0, 2000, 97))
def test_no_length_of_a_cut_shard_passes_for_a_whole_one(tmp_path: Path, size: int) -> None:
    with RunStore(tmp_path, FINGERPRINT) as store:
        path = store.write([_result(1, 40)], [])
    os.truncate(path, min(size, path.stat().st_size - 1))
    with RunStore(tmp_path, FINGERPRINT) as store:
        assert store.covered == set()


@pytest.mark.parametrize("change", [{"model": "c" * 64}, {"conf": 0.25}, {"agnostic": True}, {"image_list": "d" * 64}])
@pytest.mark.parametrize("run_file", [True, False])
def test_another_fingerprint_is_refused_and_nothing_is_touched(
    tmp_path: Path, change: dict[str, str | float | bool], run_file: bool
) -> None:
    with RunStore(tmp_path, FINGERPRINT) as store:
        store.write([_result(1, 1)], [])
        broken = store.write([_result(2, 1)], [])
    os.truncate(broken, 30)
    if not run_file:
        (tmp_path / "run.json").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file() and path.name != ".lock"}
    key = next(iter(change)).replace("_", " ")
    with (
        pytest.raises(UsageError, match=f"another run: {key} .* there, .* here") as caught,
        RunStore(tmp_path, {**FINGERPRINT, **change}),
    ):
        pass
    assert caught.value.exit_code == 2
    assert before == {
        path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file() and path.name != ".lock"
    }


def test_a_shard_of_another_run_among_ours_is_moved_aside(tmp_path: Path) -> None:
    with RunStore(tmp_path / "other", {**FINGERPRINT, "conf": 0.5}) as store:
        foreign = store.write([_result(1, 2)], [])
    with RunStore(tmp_path / "ours", FINGERPRINT) as store:
        store.write([_result(1, 3)], [])
    aside = tmp_path / "ours/predictions/part-00007.parquet"
    aside.write_bytes(foreign.read_bytes())
    with pytest.raises(ArtifactError, match="of another run"):
        read_predictions(tmp_path / "ours")
    with RunStore(tmp_path / "ours", FINGERPRINT) as store:
        assert "moved aside" in store.messages[0]
        assert store.covered == {1}
    assert len(read_predictions(tmp_path / "ours")) == 3
    assert aside.with_name("part-00007.parquet.foreign").exists()


def test_a_copied_shard_does_not_count_its_images_twice(tmp_path: Path) -> None:
    with RunStore(tmp_path, FINGERPRINT) as store:
        path = store.write([_result(1, 2)], [])
    path.with_name("part-00004.parquet").write_bytes(path.read_bytes())
    with pytest.raises(ArtifactError, match="another shard has"):
        read_predictions(tmp_path)
    with RunStore(tmp_path, FINGERPRINT) as store:
        assert "removed" in store.messages[0]
    assert len(read_predictions(tmp_path)) == 2


def test_replaced_image_files_make_another_run(tmp_path: Path) -> None:
    with RunStore(tmp_path, FINGERPRINT, {1: 1001, 2: 1}) as store:
        store.write([_result(1, 1)], [])
    with RunStore(tmp_path, FINGERPRINT, {1: 1001, 2: 2}) as store:  # 2 has no result yet: it may change
        assert store.covered == {1}
    with RunStore(tmp_path, FINGERPRINT, {1: -1}) as store:  # gone, not replaced
        assert store.covered == {1}
    with pytest.raises(UsageError, match="1 image files were replaced"), RunStore(tmp_path, FINGERPRINT, {1: 5}):
        pass


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    with RunStore(tmp_path, FINGERPRINT) as store:
        store.write([_result(1, 1)], [])
    leftovers = [tmp_path / "predictions/.part-00001.parquet.tmp", tmp_path / ".run.json.tmp"]
    for path in leftovers:
        path.write_bytes(b"half")
    with RunStore(tmp_path, FINGERPRINT):
        assert not any(path.exists() for path in leftovers)


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from parkdet.runtime.store import RunStore\n"
        f"with RunStore({os.fspath(tmp_path)!r}, {FINGERPRINT!r}):\n"
        "    print('open', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(InUseError, match=f"pid {other.pid}") as caught, RunStore(tmp_path, FINGERPRINT):
            pass
        assert caught.value.exit_code == 1
        other.kill()
    with RunStore(tmp_path, FINGERPRINT) as store:  # a kill gives the lock back
        store.write([_result(1, 1)], [])


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_no_half_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with RunStore(tmp_path, FINGERPRINT) as store:
        store.write([_result(1, 1)], [])
        with monkeypatch.context() as patch:
            patch.setattr(os if call == "fsync" else Path, call, full)
            with pytest.raises(ParkdetError, match=r"part-00001\.parquet: cannot be written \(No space left"):
                store.write([_result(2, 1)], [])
        assert store.covered == {1}
        assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["part-00000.parquet"]
        store.write([_result(2, 1)], [])
    assert covered_images(tmp_path) == {1, 2}


def test_a_kill_while_writing_leaves_whole_shards(tmp_path: Path, start_writer: Callable[[Path], int]) -> None:
    total = 0
    for _ in range(5):
        written = start_writer(tmp_path)
        with RunStore(tmp_path, FINGERPRINT) as store:
            assert store.messages == []  # nothing to repair: no shard is ever half there
            total = len(store.covered)
            assert total >= written
    assert total > 0


@pytest.fixture
def start_writer() -> Callable[[Path], int]:
    """Starts a process that writes shards as fast as it can and kills it at some moment; counts what it said."""
    program = (
        "import sys, numpy as np\n"
        "from parkdet.runtime.store import RunStore\n"
        "from parkdet.runtime.shards import ImageResult\n"
        f"with RunStore(sys.argv[1], {FINGERPRINT!r}) as store:\n"
        "    first = max(store.covered, default=0) + 1\n"
        "    for i in range(first, first + 100000):\n"
        "        store.write([ImageResult(image_id=i, file_bytes=1, xywh=np.zeros((50, 4), np.float32),\n"
        "            scores=np.zeros(50, np.float32), category_ids=np.zeros(50, np.int32))], [])\n"
        "        print(i, flush=True)\n"
    )

    def run(folder: Path) -> int:
        with subprocess.Popen(
            [sys.executable, "-c", program, os.fspath(folder)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            last = 0
            for _ in range(int(np.random.default_rng().integers(1, 30))):
                last = int(writer.stdout.readline())
            writer.kill()
        return last

    return run
