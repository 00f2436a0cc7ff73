"""`parkdet infer`: run folders, continuing, exit codes, and kills at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import polars as pl
import pytest

from parkdet.runtime.errors import UsageError
from parkdet.runtime.geometry import ImageArray
from parkdet.runtime.inference import InferOptions, run_inference
from parkdet.runtime.inference_report import REPORT_FILE
from parkdet.runtime.shards import ImageResult, read_shard, read_table, write_shard
from parkdet.runtime.store import RunStore, covered_images, read_fingerprint, read_predictions

Picture = Callable[..., ImageArray]
RunCli = Callable[..., Any]


@pytest.fixture
def data(tmp_path: Path, picture: Picture) -> Path:
    """Twelve test images of two shapes in the contest's layout, none of them bad."""
    root = tmp_path / "data"
    (root / "test/images").mkdir(parents=True)
    entries = []
    for index in range(12):
        name = f"밤 실외.{index}.png"
        size = (60, 90) if index % 3 else (90, 60)
        cv2.imencode(".png", picture(*size, index))[1].tofile(root / "test/images" / name)
        entries.append({"id": 500 - index, "file_name": name, "width": size[1], "height": size[0]})
    (root / "Test_Images_Information.json").write_text(json.dumps({"images": entries}), encoding="utf-8")
    return root


@pytest.fixture
def infer(run_cli: RunCli, tiny_onnx: Path, tmp_path: Path) -> RunCli:
    """`parkdet infer` with the tiny model into runs/ of the temporary folder."""

    def run(*arguments: str | Path) -> Any:
        return run_cli("infer", "--weights", tiny_onnx, "--project", tmp_path / "runs", *arguments)

    return run


def test_predictions_of_a_data_set_land_in_the_run_folder(infer: RunCli, data: Path, tmp_path: Path) -> None:
    code, out, err = infer("--data", data)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == lines[-1] == f"Run folder: {tmp_path / 'runs/exp'}"
    assert "12 of 12 with a result" in out
    assert "Bottleneck: " in out
    assert "images/s" in out
    frame = read_predictions(tmp_path / "runs/exp")
    assert covered_images(tmp_path / "runs/exp") == set(range(489, 501))
    assert set(frame["category_id"].unique()) <= {3, 7, 8}
    assert not list((tmp_path / "runs/exp").rglob("*.tmp"))


def test_both_backends_find_the_same(infer: RunCli, data: Path, tmp_path: Path) -> None:
    for name in ("openvino", "onnxruntime"):
        assert infer("--data", data, "--backend", name, "--precision", "fp32", "--name", name)[0] == 0
    one, other = (read_predictions(tmp_path / "runs" / name) for name in ("openvino", "onnxruntime"))
    assert one["image_id"].equals(other["image_id"])
    assert (one["score"] - other["score"]).abs().max() < 1e-4  # type: ignore[operator]


def test_a_finished_run_is_left_alone_and_fresh_begins_another(infer: RunCli, data: Path, tmp_path: Path) -> None:
    infer("--data", data)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.parquet")}
    code, out, err = infer("--data", data)
    assert code == 0
    assert "All 12 images are there already; nothing to do" in err
    assert out.splitlines()[0] == out.splitlines()[-1] == f"Run folder: {tmp_path / 'runs/exp'}"
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.parquet")}
    assert infer("--data", data, "--fresh")[0] == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["exp", "exp2"]
    assert read_predictions(tmp_path / "runs/exp").equals(read_predictions(tmp_path / "runs/exp2"))


def test_a_run_goes_on_where_it_stopped(infer: RunCli, data: Path, tmp_path: Path) -> None:
    infer("--data", data, "--name", "a")
    whole = read_predictions(tmp_path / "runs/a")
    # What a kill after four images would have left.
    _keep_only(tmp_path / "runs/a", {500, 499, 498, 497})
    for extra in ((), ("--exist-ok",)):
        code, _, err = infer("--data", data, "--name", "a", *extra)
        assert code == 0
    assert (tmp_path / "runs/a2").exists() is False
    code, _, err = infer("--data", data, "--name", "a", "--exist-ok")
    assert "nothing to do" in err
    assert read_predictions(tmp_path / "runs/a").equals(whole)


def test_going_on_says_how_much_is_there(infer: RunCli, data: Path, tmp_path: Path) -> None:
    infer("--data", data)
    _keep_only(tmp_path / "runs/exp", {500, 499, 498})
    _, out, err = infer("--data", data)
    assert "3 of 12 images are there already" in err
    assert "(3 before this run)" in out


def _keep_only(run: Path, kept: set[int]) -> None:
    """Rewrite a finished run as one that stopped early."""
    (path,) = (run / "predictions").glob("*.parquet")
    shard, frame = read_shard(path), pl.from_arrow(read_table(path).replace_schema_metadata(None))
    assert isinstance(frame, pl.DataFrame)
    results = []
    for image_id, size in zip(shard.covered, shard.file_bytes, strict=True):
        rows = frame.filter(pl.col("image_id") == image_id)
        if image_id in kept:
            results.append(
                ImageResult(
                    image_id=image_id, file_bytes=size, xywh=rows.select("x", "y", "w", "h").to_numpy(),
                    scores=rows["score"].to_numpy(), category_ids=rows["category_id"].to_numpy(),
                )
            )  # fmt: skip
    write_shard(path, shard.fingerprint, results, [], shard.caps)


def test_other_settings_get_a_folder_of_their_own_or_are_refused(infer: RunCli, data: Path, tmp_path: Path) -> None:
    infer("--data", data, "--name", "a")
    code, out, err = infer("--data", data, "--name", "a", "--conf-thres", "0.3", "--exist-ok")
    assert code == 2
    assert "conf 0.01 there, 0.3 here" in err
    code, out, err = infer("--data", data, "--name", "a", "--conf-thres", "0.3")
    assert code == 0
    assert "conf 0.01 there, 0.3 here" in err
    assert out.splitlines()[0] == f"Run folder: {tmp_path / 'runs/a2'}"
    # The first settings again find the first folder, although a2 is newer.
    assert infer("--data", data, "--name", "a")[1].splitlines()[0] == f"Run folder: {tmp_path / 'runs/a'}"


def test_another_model_and_another_image_list_are_other_runs(
    infer: RunCli, run_cli: RunCli, data: Path, tmp_path: Path, random_tiny_model: Callable[..., Any]
) -> None:
    infer("--data", data)
    other = random_tiny_model(seed=5).save(tmp_path / "other.onnx")
    arguments = ("infer", "--weights", other, "--data", data, "--project", tmp_path / "runs", "--exist-ok")
    code, _, err = run_cli(*arguments)
    assert (code, "model " in err) == (2, True)
    path = data / "Test_Images_Information.json"
    listed = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({"images": listed["images"][:-1]}), encoding="utf-8")
    code, _, err = infer("--data", data, "--exist-ok")
    assert (code, "images 12 there, 11 here" in err) == (2, True)


def test_replaced_images_are_not_passed_off_with_old_predictions(
    infer: RunCli, data: Path, tmp_path: Path, picture: Picture
) -> None:
    infer("--data", data)
    cv2.imencode(".png", picture(60, 90, 77))[1].tofile(data / "test/images/밤 실외.1.png")
    code, out, err = infer("--data", data)
    assert (code, "1 image files were replaced" in err) == (0, True)
    assert out.splitlines()[0] == f"Run folder: {tmp_path / 'runs/exp2'}"
    assert infer("--data", data, "--name", "exp", "--exist-ok")[0] == 2


def test_bad_images_are_told_and_the_rest_is_done(infer: RunCli, data: Path, tmp_path: Path) -> None:
    images = data / "test/images"
    (images / "밤 실외.0.png").write_bytes(b"")
    (images / "밤 실외.5.png").unlink()
    content = (images / "밤 실외.7.png").read_bytes()
    (images / "밤 실외.7.png").write_bytes(content[:-40])
    code, out, err = infer("--data", data)
    assert code == 1
    assert "3 of 12 images could not be read" in err
    assert "밤 실외.0.png: has zero bytes" in err
    assert "밤 실외.5.png: has no file" in err
    assert "밤 실외.7.png: is cut off" in err
    assert "9 of 12 with a result, 3 could not be read" in out
    assert "Traceback" not in err
    (images / "밤 실외.7.png").write_bytes(content)
    code, out, err = infer("--data", data)
    assert code == 1
    assert "10 of 12 with a result (9 before this run), 2 could not be read" in out
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["exp"]


def test_a_plain_folder_gets_ids_by_name_and_a_list_of_them(infer: RunCli, tmp_path: Path, picture: Picture) -> None:
    for index, name in enumerate(("c.png", "a b.jpg", "나.png")):
        cv2.imencode(Path(name).suffix, picture(50, 70, index))[1].tofile(tmp_path / name)
    code, _, err = infer("--source", tmp_path, "--name", "plain")
    assert code == 0, err
    listed = json.loads((tmp_path / "runs/plain/images.json").read_text(encoding="utf-8"))
    assert [(entry["id"], entry["file_name"]) for entry in listed["images"]] == [
        (1, "a b.jpg"), (2, "c.png"), (3, "나.png"),
    ]  # fmt: skip
    assert covered_images(tmp_path / "runs/plain") == {1, 2, 3}
    assert infer("--source", tmp_path / "c.png", "--name", "one")[0] == 0


def test_names_that_are_no_text_stay_what_they_are(infer: RunCli, tmp_path: Path, picture: Picture) -> None:
    """Linux takes any bytes. What other programs read of a run must be JSON all the same."""
    folder = tmp_path / "photos"
    folder.mkdir()
    names = [b"latin\xe9.png", b"bad\xff.png", "줄\n바꿈.png".encode()]
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(cv2.imencode(".png", picture(50, 70))[1].tobytes())
    (folder / os.fsdecode(names[1])).write_bytes(b"no image")
    code, _, err = infer("--source", folder, "--name", "bytes")
    assert code == 1, err
    run = tmp_path / "runs/bytes"
    listed = json.loads((run / "images.json").read_text(encoding="utf-8"))["images"]
    assert sorted(os.fsencode(entry["file_name"]) for entry in listed) == sorted(names)
    (failed,) = json.loads((run / REPORT_FILE).read_text(encoding="utf-8"))["failed"]
    assert os.fsencode(failed["file_name"]) == names[1]
    assert len(covered_images(run)) == 2


def test_what_lies_beside_the_images_does_not_stop_the_run(infer: RunCli, data: Path) -> None:
    images = data / "test/images"
    (images / "circle.png").symlink_to("circle.png")
    (images / "gone.png").symlink_to("nowhere.png")
    (images / "up").symlink_to("..")
    os.mkfifo(images / "pipe.png")
    (images / "folder.png").mkdir()
    code, out, err = infer("--data", data)
    assert code == 0, err
    assert "12 of 12 with a result" in out


def test_usage_errors_exit_2_and_make_no_folder(infer: RunCli, run_cli: RunCli, data: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (infer(), "--data or with --source"),
        (infer("--data", data, "--source", data), "--data or with --source"),
        (infer("--data", tmp_path / "none"), "none"),
        (infer("--source", empty), "holds no images"),
        (infer("--data", data, "--backend", "caffe"), "'caffe' is not one of openvino, onnxruntime"),
        (infer("--data", data, "--device", "tpu"), "device 'tpu'"),
        (infer("--data", data, "--conf-thres", "2"), "conf-thres"),
        (infer("--data", data, "--batch-size", "0"), "batch-size"),
        (infer("--data", data, "--fresh", "--exist-ok"), "one of the two"),
        (run_cli("infer", "--weights", tmp_path / "none.onnx", "--data", data), "no such file"),
    ]
    for (code, _, err), words in cases:
        assert code == 2, err
        assert words in err
        assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_is_to_be_exported_first(data: Path, tmp_path: Path) -> None:
    (tmp_path / "best.pt").touch()
    with pytest.raises(UsageError, match="parkdet export --weights"):
        run_inference(tmp_path / "best.pt", InferOptions(data=data, project=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_folder_in_use_is_refused(infer: RunCli, data: Path, tmp_path: Path) -> None:
    infer("--data", data)
    fingerprint = read_fingerprint(tmp_path / "runs/exp")
    assert fingerprint is not None
    program = (
        "import sys, json; from parkdet.runtime.store import RunStore\n"
        "with RunStore(sys.argv[1], json.loads(sys.argv[2])): print('open', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "runs/exp"), json.dumps(fingerprint)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        code, _, err = infer("--data", data)
        other.kill()
    assert code == 1
    assert f"pid {other.pid}" in err


def test_help_answers_without_heavy_imports(tmp_path: Path) -> None:
    program = (
        "import sys; import parkdet.runtime.cli\n"
        "assert not {'numpy', 'cv2', 'polars', 'pyarrow', 'openvino', 'onnxruntime', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


SLOW_RUN = """
import sys, time
from parkdet.runtime import pipeline
from parkdet.runtime.backends.openvino import OpenVinoBackend
fast = OpenVinoBackend._run
def slow(self, images):
    time.sleep(float(sys.argv[1]))
    return fast(self, images)
OpenVinoBackend._run = slow
PipelineSettings = pipeline.PipelineSettings
import parkdet.runtime.inference as inference
inference.PipelineSettings = lambda **settings: PipelineSettings(**settings, shard_images=3)
from parkdet.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
"""`parkdet` with a model that takes so many seconds for an image, and shards of three: many moments to be killed at."""


def _start(*arguments: str | Path, image_s: float = 0.02) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, str(image_s), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_kills_at_random_moments_change_nothing_in_the_end(
    infer: RunCli, data: Path, tmp_path: Path, tiny_onnx: Path
) -> None:
    infer("--data", data, "--name", "whole")
    whole = read_predictions(tmp_path / "runs/whole")
    moments = random.Random()
    arguments = ("infer", "--weights", tiny_onnx, "--data", data, "--project", tmp_path / "runs", "--name", "killed")
    counts = []
    for _ in range(8):
        with _start(*arguments) as process:
            assert process.stdout is not None
            process.stdout.readline()  # the run folder's name: from here on there is work to lose
            time.sleep(moments.uniform(0, 0.25))
            process.kill()
        try:
            counts.append(len(covered_images(tmp_path / "runs/killed")))
        except UsageError:  # killed before the first shard
            counts.append(0)
    assert counts == sorted(counts)
    code, _, err = infer("--data", data, "--name", "killed")
    assert code == 0, err
    assert read_predictions(tmp_path / "runs/killed").equals(whole)
    assert covered_images(tmp_path / "runs/killed") == covered_images(tmp_path / "runs/whole")
    assert not (tmp_path / "runs/killed2").exists()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_the_work_and_exits_130(
    infer: RunCli, data: Path, tmp_path: Path, tiny_onnx: Path, stop: signal.Signals
) -> None:
    # Slow enough that a signal after the first shard comes before the last one, however busy the machine is.
    process = _start("infer", "--weights", tiny_onnx, "--data", data, "--project", tmp_path / "runs", image_s=0.5)
    predictions = tmp_path / "runs/exp/predictions"
    while not list(predictions.glob("part-*")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(stop)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "the same command goes on" in err
    done = len(covered_images(tmp_path / "runs/exp"))
    assert 3 <= done < 12
    assert f"stopped with {done} of 12" in err
    assert infer("--data", data)[0] == 0
    assert infer("--data", data, "--name", "whole")[0] == 0
    assert read_predictions(tmp_path / "runs/exp").equals(read_predictions(tmp_path / "runs/whole"))


def test_a_shard_cut_by_hand_is_repaired_with_a_message(infer: RunCli, data: Path, tmp_path: Path) -> None:
    infer("--data", data)
    whole = read_predictions(tmp_path / "runs/exp")
    (path,) = (tmp_path / "runs/exp/predictions").glob("part-*")
    os.truncate(path, path.stat().st_size // 2)
    code, _, err = infer("--data", data)
    assert code == 0
    assert "part-00000.parquet: is damaged or cut off" in err
    assert read_predictions(tmp_path / "runs/exp").equals(whole)


def test_the_real_test_set_is_read_through(infer: RunCli, shared: Path, tmp_path: Path) -> None:
    code, out, err = infer("--data", shared / "data/blood-cells", "--imgsz", "64")
    assert code == 0, err
    assert "87 of 87 with a result" in out
    with RunStore(tmp_path / "runs/exp", read_fingerprint(tmp_path / "runs/exp") or {}) as store:
        assert len(store.covered) == 87
