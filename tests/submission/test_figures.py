"""The figures of a submission: counted from the cut, kept in a file, printed, and shown."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import polars as pl
import pytest

from parkdet.cli.report_page import ReportPage, render_page
from parkdet.cli.submission_charts import submission_charts
from parkdet.runtime.errors import ArtifactError
from parkdet.submission import fit
from parkdet.submission.figures import NmsFigures, SubmissionFigures, TuningFigures
from parkdet.submission.summary import summary
from parkdet.submission.tune import SizePoint

Table = Callable[..., pl.DataFrame]
NAMES = {1: "세단", 2: "bus", 99: "cart"}


@pytest.fixture
def cut(random_table: Table) -> SubmissionFigures:
    return SubmissionFigures.of_fit(fit(random_table(400, images=20), 12_000), NAMES)


@pytest.fixture
def tuned(cut: SubmissionFigures) -> SubmissionFigures:
    return replace(
        cut,
        threshold=None,
        metric="map50=0.1,map75=0.9",
        points=[
            SizePoint(size_bytes=6_000, single=0.5, per_class=0.6),
            SizePoint(size_bytes=12_000, single=0.55, per_class=0.61),
        ],
        tuning=TuningFigures(
            image_count=3000, share_bytes=3_000_000, folds=5, is_cut=True, single=0.55,
            held_out={"expected": 0.60123, "measured": 0.58}, estimate="expected", wins=True,
        ),
        nms=NmsFigures(
            inferred="IoU 0.7, at most 50 an image", best="IoU 0.5, at most 100 an image", inferred_metric=0.54,
            held_out=0.56, wins=True, applied=False, remedy="--iou-thres 0.5 --max-det 100", max_dets=[50, 100],
            rows=[(0.5, [0.51, 0.52]), (0.7, [0.54, 0.55])],
        ),
    )  # fmt: skip


def text_of(figures: SubmissionFigures) -> str:
    page = render_page(ReportPage(title="x", submission=figures))
    body = page[page.index("<main>") : page.index("</main>")]
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", body)).split())


def test_every_detection_and_byte_is_counted(random_table: Table) -> None:
    table = random_table(400, images=20)
    fitted = fit(table, 12_000)
    figures = SubmissionFigures.of_fit(fitted, NAMES)
    written = b"".join(fitted.format.file_chunks(fitted.kept))
    assert figures.size_bytes == len(written) < figures.limit_bytes == 12_000
    entries = json.loads(written)
    categories = sorted({*NAMES, *table["category_id"].to_list()})
    assert [share.category_id for share in figures.per_class] == categories
    assert [share.name for share in figures.per_class[:3]] == ["세단", "bus", "3"]
    for share in figures.per_class:
        lines = [entry for entry in entries if entry["category_id"] == share.category_id]
        assert share.kept_count == len(lines)
        assert share.total_count == (table["category_id"] == share.category_id).sum()
        # What was read as an int is written as one: the lines are those of the file.
        assert share.size_bytes == sum(len(json.dumps(line, separators=(",", ":"))) + 1 for line in lines)
    assert sum(figures.score_counts) == figures.total_count == 400
    assert sum(figures.kept_score_counts) == figures.kept_count
    low = int(fitted.threshold * 50)
    assert figures.kept_score_counts[low + 1 :] == figures.score_counts[low + 1 :]
    assert sum(figures.kept_score_counts[:low]) == 0
    assert figures.threshold == fitted.threshold > 0
    assert SubmissionFigures.of_fit(fit(table, 10**6), {}).threshold is None


def test_no_detections_have_figures(make_table: Table) -> None:
    figures = SubmissionFigures.of_fit(fit(make_table([]), 100), {1: "van"})
    assert figures.per_class[0].total_count == 0
    assert "nothing was cut" in summary(figures)
    assert submission_charts(figures) == []


def test_bins_before_and_after_the_cut_must_agree(cut: SubmissionFigures) -> None:
    with pytest.raises(ValueError, match="2 bins before the cut, 50 after"):
        replace(cut, score_counts=[1, 2])


def test_figures_come_back_from_their_file(tmp_path: Path, cut: SubmissionFigures, tuned: SubmissionFigures) -> None:
    for figures in (cut, tuned):
        figures.write(tmp_path / "s.cut.json")
        back = SubmissionFigures.read(tmp_path / "s.cut.json")
        assert json.dumps(asdict(back)) == json.dumps(asdict(figures))
        assert summary(back) == summary(figures)
        assert text_of(back) == text_of(figures)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"version": 9}', '{"version": 1, "points": 3}', "x"])
def test_a_damaged_file_of_figures_is_told(tmp_path: Path, damage: str) -> None:
    (tmp_path / "s.cut.json").write_text(damage)
    with pytest.raises(ArtifactError, match=r"s\.cut\.json: is"):
        SubmissionFigures.read(tmp_path / "s.cut.json")


def test_what_tuning_was_worth_is_told_with_both_figures(tuned: SubmissionFigures) -> None:
    text = text_of(tuned)
    assert "cut by a threshold for each class" in text
    assert "0.55000 with one threshold for all classes, 0.60123 with one for each class (expected AP)" in text
    assert "Used: thresholds for each class (expected AP)." in text
    assert "run infer again with --iou-thres 0.5 --max-det 100" in text
    assert "IoU at most 50 at most 100 0.5 0.51000 0.52000 0.7 0.54000 0.55000" in text
    printed = summary(tuned)
    assert re.search(r"^one threshold +0\.55000$", printed, re.MULTILINE)
    assert re.search(r"^one a class, expected AP, 5 parts held back +0\.60123  <- used$", printed, re.MULTILINE)
    assert re.search(r"^ +12,000 +0\.55000 +0\.61000$", printed, re.MULTILINE)
    lost = replace(tuned, tuning=replace(tuned.tuning, wins=False))  # type: ignore[type-var]
    assert "Used: one threshold for all." in text_of(lost)
    assert "<- not used" in summary(lost)


def test_the_metric_is_drawn_against_the_size_with_the_limit(tuned: SubmissionFigures) -> None:
    charts = {chart.key: chart for chart in submission_charts(tuned)}
    assert [(trace["name"], trace["x"], trace["y"]) for trace in charts["chart-size"].figure["data"]] == [
        ("one threshold", [6_000, 12_000], [0.5, 0.55]),
        ("one a class", [6_000, 12_000], [0.6, 0.61]),
    ]
    assert [shape["x0"] for shape in charts["chart-size"].figure["layout"]["shapes"]] == [12_000]
    assert "shapes" not in charts["chart-scores"].figure["layout"]
    alone = replace(tuned, points=[replace(point, per_class=None) for point in tuned.points])
    assert len({chart.key: chart for chart in submission_charts(alone)}["chart-size"].figure["data"]) == 1


def test_the_printed_histogram_counts_what_is_there(cut: SubmissionFigures) -> None:
    rows = re.findall(r"^ +(0\.\d) - \S+ +([\d,]+) +([\d,]+)  ([#.]*)$", summary(cut), re.MULTILINE)
    assert sum(int(read.replace(",", "")) for _, read, _, _ in rows) == 400
    assert sum(int(kept.replace(",", "")) for _, _, kept, _ in rows) == cut.kept_count
    assert max(len(bar) for *_, bar in rows) == 40
