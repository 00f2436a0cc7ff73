"""`parkdet submit` with several runs, with validation runs, with two files to compare; `parkdet report` of runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from parkdet.runtime.candidates import ImageCandidates
from parkdet.runtime.evaluation import evaluate, metric
from parkdet.runtime.geometry import Letterbox
from parkdet.runtime.nms import NmsSettings
from parkdet.runtime.shards import ImageResult
from parkdet.runtime.store import RunStore, read_predictions

RunCli = Callable[..., Any]
World = Callable[..., tuple[pl.DataFrame, dict[str, Any]]]
FREQUENCIES = (0.9, 0.07, 0.03)
VAL, TEST = 150, 200
FINGERPRINT: dict[str, str | int | float | bool] = {"model": "m" * 64, "conf": 0.01, "iou": 0.7, "max_det": 50}
SIDE = 400


@pytest.fixture(scope="module")
def worlds(small_world: World) -> tuple[tuple[pl.DataFrame, dict[str, Any]], tuple[pl.DataFrame, dict[str, Any]]]:
    """Detections and truth of the validation images (ids from 1) and of the test images (ids from 1,001)."""
    (val, val_truth), (test, test_truth) = (
        small_world(seed, images=images, frequencies=FREQUENCIES) for seed, images in ((1, VAL), (2, TEST))
    )
    for image in test_truth["images"]:
        image["id"] += 1000
    for box in test_truth["annotations"]:
        box["image_id"] += 1000
    return (val, val_truth), (test.with_columns(pl.col("image_id") + 1000), test_truth)


@pytest.fixture
def data(tmp_path: Path, worlds: Any) -> Path:
    (_, val_truth), (_, test_truth) = worlds
    root = tmp_path / "data"
    for folder in ("train/label", "train/images", "test/images"):
        (root / folder).mkdir(parents=True)

    def listed(truth: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"id": i["id"], "file_name": f"{i['id']}.png", "width": SIDE, "height": SIDE} for i in truth["images"]]

    (root / "train" / "label" / "Train.json").write_text(json.dumps({**val_truth, "images": listed(val_truth)}))
    (root / "Test_Images_Information.json").write_text(json.dumps({"images": listed(test_truth)}))
    return root


def write_run(folder: Path, table: pl.DataFrame, image_ids: list[int], candidates: bool = False, **other: Any) -> Path:
    results = []
    for image_id in image_ids:
        rows = table.filter(pl.col("image_id") == image_id).sort("score", descending=True)
        xywh = rows.select("x", "y", "w", "h").to_numpy().clip(0, SIDE)
        xywh[:, 2:] = np.minimum(xywh[:, 2:], SIDE - xywh[:, :2]).clip(0.5)
        xywh[:, :2] = np.minimum(xywh[:, :2], SIDE - xywh[:, 2:])
        xyxy = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1).astype(np.float32)
        kept = ImageCandidates(
            image_id=image_id, letterbox=Letterbox((SIDE, SIDE), (SIDE, SIDE), (SIDE, SIDE), 0, 0),
            settings=NmsSettings(), xyxy=xyxy, scores=rows["score"].to_numpy(),
            category_ids=rows["category_id"].to_numpy(),
        )  # fmt: skip
        # What NMS at IoU 0.7 leaves of them.
        boxes, scores, category_ids = kept.detections()
        results.append(
            ImageResult(
                image_id=image_id, file_bytes=1,
                xywh=np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1),
                scores=scores, category_ids=category_ids, candidates=kept if candidates else None,
            )
        )  # fmt: skip
    with RunStore(folder, {**FINGERPRINT, **other}, keep_candidates=candidates) as store:
        for start in range(0, len(results), 60):
            store.write(results[start : start + 60], [])
    return folder


def ids_of(truth: dict[str, Any]) -> list[int]:
    return [image["id"] for image in truth["images"]]


def score_of(path: Path, truth: dict[str, Any]) -> float:
    return metric(evaluate(path, truth, max_det=50))


def test_thresholds_by_class_are_better_on_the_test_images(
    run_cli: RunCli, tmp_path: Path, data: Path, worlds: Any
) -> None:
    (val, val_truth), (test, test_truth) = worlds
    run = write_run(tmp_path / "test", test, ids_of(test_truth))
    tune = write_run(tmp_path / "val", val, ids_of(val_truth))
    common = ("submit", "--predictions", run, "--data", data, "--limit", "20kB")
    assert run_cli(*common, "--output", tmp_path / "single.json").code == 0
    code, out, err = run_cli(*common, "--tune", tune, "--output", tmp_path / "tuned.json")
    assert code == 0, err
    assert "choosing thresholds by class" in err
    # All labelled images of this data set are in the run.
    assert "warning: --tune: the run covers all labelled images" in err
    single, tuned = score_of(tmp_path / "single.json", test_truth), score_of(tmp_path / "tuned.json", test_truth)
    assert tuned > single + 0.05
    assert 19_900 < (tmp_path / "tuned.json").stat().st_size < 20_000
    # Both figures are told, and which was used.
    assert re.search(r"^one threshold +0\.\d{5}$", out, re.MULTILINE)
    assert re.search(r"^one a class, \w+ AP, 5 parts held back +0\.\d{5}  <- used$", out, re.MULTILINE)
    thresholds = dict(re.findall(r"^ +(\d) .* ([\d.e-]+)  class \d$", out, re.MULTILINE))
    assert float(thresholds["1"]) > float(thresholds["3"]) + 0.2
    entries = json.loads((tmp_path / "tuned.json").read_text())
    for category_id, threshold in thresholds.items():
        scores = [entry["score"] for entry in entries if entry["category_id"] == int(category_id)]
        assert min(scores) >= float(threshold) - 1e-3

    code, out, _ = run_cli("submit", "--check", tmp_path / "tuned.json", "--data", data, "--limit", "20kB")
    assert code == 0, out
    again = tmp_path / "again.json"
    assert run_cli(*common, "--tune", tune, "--output", again).code == 0
    assert again.read_bytes() == (tmp_path / "tuned.json").read_bytes()


def test_where_nothing_is_cut_tuning_changes_nothing(run_cli: RunCli, tmp_path: Path, data: Path, worlds: Any) -> None:
    (val, val_truth), (test, test_truth) = worlds
    run = write_run(tmp_path / "test", test, ids_of(test_truth))
    tune = write_run(tmp_path / "val", val, ids_of(val_truth))
    code, out, _ = run_cli("submit", "--predictions", run, "--data", data, "--tune", tune)
    assert code == 0
    assert "nothing is cut at this limit" in out
    tuned = (run / "submission.json").read_bytes()
    assert run_cli("submit", "--predictions", run, "--data", data).code == 0
    assert (run / "submission.json").read_bytes() == tuned


def doubled(table: pl.DataFrame) -> pl.DataFrame:
    """Every detection once more, moved a little, a little less sure: what a lower IoU of NMS would remove."""
    copies = table.with_columns(pl.col("x") + pl.col("w") * 0.12, pl.col("score") * 0.95)
    return pl.concat([table, copies, copies.with_columns(pl.col("y") + pl.col("h") * 0.12, pl.col("score") * 0.97)])


def test_nms_is_tuned_on_candidates_and_repeated_on_those_of_the_test(
    run_cli: RunCli, tmp_path: Path, data: Path, worlds: Any
) -> None:
    (val, val_truth), (test, test_truth) = worlds
    run = write_run(tmp_path / "test", doubled(test), ids_of(test_truth), candidates=True)
    bare = write_run(tmp_path / "bare", doubled(test), ids_of(test_truth))
    tune = write_run(tmp_path / "val", doubled(val), ids_of(val_truth), candidates=True)
    common = ("submit", "--data", data, "--limit", "60kB")
    assert run_cli(*common, "--predictions", run, "--output", tmp_path / "single.json").code == 0
    code, out, err = run_cli(*common, "--predictions", run, "--tune", tune, "--output", tmp_path / "tuned.json")
    assert code == 0, err
    assert "used: NMS was repeated on the candidates" in out
    chosen = re.search(r"on all of them: IoU ([\d.]+), at most (\d+)", out)
    assert chosen is not None and float(chosen[1]) < 0.7
    assert score_of(tmp_path / "tuned.json", test_truth) > score_of(tmp_path / "single.json", test_truth) + 0.05

    code, out, err = run_cli(*common, "--predictions", bare, "--tune", tune, "--output", tmp_path / "bare.json")
    assert code == 0, err
    assert f"--iou-thres {chosen[1]} --max-det {chosen[2]}" in out


def shaken(table: pl.DataFrame, seed: int) -> pl.DataFrame:
    noise = np.random.default_rng(seed).normal(0, 2.5, (table.height, 4))
    shaken = {name: pl.Series(noise[:, number]) for number, name in enumerate("xywh")}
    return table.with_columns(**{name: (pl.col(name) + shift).clip(1) for name, shift in shaken.items()})


def test_two_runs_are_merged_and_tuned_together(run_cli: RunCli, tmp_path: Path, data: Path, worlds: Any) -> None:
    (val, val_truth), (test, test_truth) = worlds
    runs, tunes = [], []
    for seed, name in enumerate("ab"):
        # Each model is wrong about every edge in its own way.
        runs.append(write_run(tmp_path / name, shaken(test, seed), ids_of(test_truth), model=name * 64))
        tunes.append(write_run(tmp_path / f"val {name}", shaken(val, seed), ids_of(val_truth), model=name * 64))
    target = tmp_path / "merged.json"
    both = ("submit", "--data", data, "--predictions", runs[0], "--predictions", runs[1], "--output", target)
    for options in (
        (),
        ("--merge", "nms", "--merge-weights", "2,1"),
        ("--tune", tunes[0], "--tune", tunes[1], "--limit", "30kB"),
    ):
        code, out, err = run_cli(*both, *options)
        assert code == 0, err
        merged = score_of(target, test_truth)
        if not options:
            assert all(merged > metric(evaluate(read_predictions(run), test_truth, max_det=50)) + 0.03 for run in runs)
    assert "one a class" in out
    assert not (runs[0] / "submission.json").exists()


def test_runs_that_do_not_go_together_are_refused(run_cli: RunCli, tmp_path: Path, data: Path, worlds: Any) -> None:
    (val, val_truth), (test, test_truth) = worlds
    run = write_run(tmp_path / "test", test, ids_of(test_truth))
    other = write_run(tmp_path / "other", test, ids_of(test_truth), model="o" * 64)
    tune = write_run(tmp_path / "val", val, ids_of(val_truth), model="x" * 64)
    right = write_run(tmp_path / "right", val, ids_of(val_truth))
    twin = write_run(tmp_path / "twin", test, ids_of(test_truth))
    base = ("submit", "--data", data, "--predictions", run)
    for options, message in [
        (("--predictions", run), "the same run is there twice"),
        (("--predictions", other, "--merge-weights", "1"), "1 weights for 2 runs"),
        (("--predictions", other, "--merge-weights", "1,x"), "one number a run"),
        (("--predictions", other, "--merge-weights", "1,0"), "larger than 0"),
        (("--predictions", other, "--tune", right), "1 validation runs for 2 runs"),
        (("--tune", tune), "is of another model or other settings"),
        (("--tune", run), "is over the images to submit"),
        (("--tune", twin), "200 of its 200 images have no truth"),
        (("--tune", tmp_path / "none"), "no such folder"),
        (("--tune", right, "--metric", "ap"), "--metric 'ap'"),
        (("--diff", "a", "b"), "either --predictions"),
    ]:
        code, out, err = run_cli(*base, *options)
        assert (code, out) == (2, ""), (options, err)
        assert message in err
    assert not (run / "submission.json").exists()


def test_two_files_are_compared(run_cli: RunCli, tmp_path: Path) -> None:
    entry = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5, "segmentation": []}
    paths = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for path, entries in zip(paths, ([entry], [{**entry, "score": 0.25}], [entry]), strict=True):
        path.write_text(json.dumps(entries))
    code, out, err = run_cli("submit", "--diff", paths[0], paths[1])
    assert code == 3
    assert "the same box with another score: 1, by up to 0.25" in out
    assert "differ" in err
    code, out, err = run_cli("submit", "--diff", paths[0], paths[2])
    assert (code, err) == (0, "")
    assert "equal to the byte" in out
    assert run_cli("submit", "--diff", paths[0], tmp_path / "none").code == 2
    assert run_cli("submit", "--diff", paths[0], paths[1], "--output", "x").code == 2
    paths[0].write_text("{")
    assert run_cli("submit", "--diff", paths[0], paths[1]).code == 1


def page_text(path: Path) -> str:
    page = path.read_text(encoding="utf-8")
    return re.sub("<[^>]+>", " ", page[page.index("<header>") : page.index("</main>")])


def test_a_page_shows_what_was_submitted(run_cli: RunCli, tmp_path: Path, data: Path, worlds: Any) -> None:
    (val, val_truth), (test, test_truth) = worlds
    run = write_run(tmp_path / "test", test, ids_of(test_truth))
    tune = write_run(tmp_path / "val", val, ids_of(val_truth))
    submitted = run_cli("submit", "--predictions", run, "--data", data, "--limit", "20kB", "--tune", tune)
    code, out, err = run_cli("report", run)
    assert (code, err) == (0, "")
    # The tables that submit printed, then the page.
    assert out.split() == [*submitted.out.split()[:-1], str(run / "report.html")]
    text = page_text(run / "report.html")
    assert "cut by a threshold for each class" in text
    assert "Used: thresholds for each class" in text
    assert "chart-size" in (run / "report.html").read_text()

    (run / "submission.json").write_text("[]")
    code, _, err = run_cli("report", run)
    assert code == 1
    assert "has 2; run 'parkdet submit' again" in err


def test_a_run_with_truth_is_measured(run_cli: RunCli, tmp_path: Path, data: Path, worlds: Any) -> None:
    (val, val_truth), (test, test_truth) = worlds
    tune = write_run(tmp_path / "val", val, ids_of(val_truth))
    code, out, err = run_cli("report", tune, "--data", data, "--output", tmp_path / "val.html")
    assert (code, err) == (0, "")
    assert re.search(r"^ +20,000,000 +0\.\d{5}$", out, re.MULTILINE)
    text = page_text(tmp_path / "val.html")
    assert "Accuracy" in text and "none yet" in text and "class 3" in text
    assert not (tune / "report.html").exists()

    run = write_run(tmp_path / "test", test, ids_of(test_truth))
    (tmp_path / "truth.json").write_text(json.dumps(test_truth))
    assert "Accuracy" not in page_text(_reported(run_cli, run, "--data", data))
    assert "Accuracy" in page_text(_reported(run_cli, run, "--truth", tmp_path / "truth.json"))


def _reported(run_cli: RunCli, run: Path, *options: Any) -> Path:
    code, _, err = run_cli("report", run, *options)
    assert (code, err) == (0, "")
    return run / "report.html"


def test_what_cannot_be_reported_is_said(run_cli: RunCli, tmp_path: Path, worlds: Any) -> None:
    (val, val_truth), _ = worlds
    run = write_run(tmp_path / "val", val, ids_of(val_truth))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{")
    for arguments, message in [
        ((tmp_path / "none",), "no such folder"),
        ((tmp_path / "empty",), "holds neither results.csv nor predictions"),
        ((run, "--truth", tmp_path / "none.json"), "no such file"),
        ((run, "--truth", tmp_path / "bad.json"), "is not JSON"),
        ((run, "--submission", tmp_path / "none.json"), "no such file"),
        ((run, "--metric", "x"), "--metric"),
        ((run, "--data", tmp_path / "none"), "no such folder"),
        ((run, "--output", tmp_path / "none" / "page.html"), "no such folder"),
    ]:
        code, _, err = run_cli("report", *arguments)
        assert code == 2, (arguments, err)
        assert message in err
    assert not (run / "report.html").exists()


def test_a_training_is_shown_by_its_results(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("epoch,train/box_loss,metrics/mAP_0.5\n0,0.1,0.2\n1,0.05,0.4\n")
    code, out, err = run_cli("report", tmp_path)
    assert (code, out.strip(), err) == (0, str(tmp_path / "report.html"), "")
    assert "Training" in page_text(tmp_path / "report.html")
