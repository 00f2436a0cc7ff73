"""The report: what is on the page is what was measured, nothing else is, and it needs nothing from outside."""

from __future__ import annotations

import base64
import html
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from parkdet.cli import report_charts, report_page
from parkdet.cli.report_page import Picture, ReportPage, render_page, write_page
from parkdet.runtime.errors import UsageError
from parkdet.runtime.evaluation import ClassAP, Evaluation
from parkdet.submission.figures import ClassShare, SubmissionFigures

VOID = {"meta", "img", "input", "br", "link", "hr"}
EVIL = "<script>alert(1)</script>"
HEADER = (
    "epoch,train/box_loss,train/obj_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,metrics/mAP_0.5:0.95,"
    "val/box_loss,x/lr0\n"
)


class Page(HTMLParser):
    """A page taken apart: every start tag with its attributes, tables as rows of text, scripts, headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.headings: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self._open.append(tag)
        match tag:
            case "table":
                self.tables.append([])
            case "tr":
                self.tables[-1].append([])
            case "td" | "th":
                self.tables[-1][-1].append("")
            case "h1" | "h2":
                self.headings.append("")
            case "script":
                self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            self.scripts[-1] += data
        elif inside == "style":
            self.styles.append(data)
        else:
            self.text.append(data)
            if "td" in self._open or "th" in self._open:
                self.tables[-1][-1][-1] += data
            if inside in ("h1", "h2"):
                self.headings[-1] += data.strip()

    def figures(self) -> dict[str, Any]:
        """The plotly figures by key."""
        found = re.search(r"const figures = (.*);\n", self.scripts[-1])
        assert found is not None
        return dict(json.loads(found[1]))


def evaluation(*names: str) -> Evaluation:
    return Evaluation(
        map=0.5123,
        map50=0.8456,
        map75=0.6017,
        map_small=math.nan,
        map_medium=0.4321,
        map_large=0.6543,
        precision=0.7771,
        recall=0.6662,
        confidence=0.313,
        images=1234,
        truths=5678,
        max_det=50,
        per_class=tuple(
            ClassAP(
                category_id=number,
                name=name,
                images=100 * number,
                truths=2000 + number,
                ap=0.41 + number / 100,
                ap50=0.71 + number / 100,
                ap75=0.51 + number / 100,
                precision=0.9,
                recall=0.8,
            )
            for number, name in enumerate(names, 1)
        ),
    )


def submission(name: str = "sedan") -> SubmissionFigures:
    return SubmissionFigures(
        size_bytes=19_999_990,
        limit_bytes=20_000_000,
        kept_count=151_234,
        total_count=976_050,
        threshold=0.0437,
        per_class=[
            ClassShare(
                category_id=1,
                name=name,
                kept_count=150_000,
                total_count=900_000,
                size_bytes=19_800_000,
                threshold=0.0437,
            ),
            ClassShare(
                category_id=2, name="cart", kept_count=1_234, total_count=76_050, size_bytes=199_989, threshold=0.0437
            ),
        ],
        score_counts=[900_000, 50_000, 20_000, 6_050, 0],
        kept_score_counts=[75_184, 50_000, 20_000, 6_050, 0],
    )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results.csv"
    path.write_text(
        HEADER + "0,0.11,0.07,,,,,,0.01\n1,0.091,0.061,0.52,0.43,0.4567,0.2345,0.12,0.009\n", encoding="utf-8"
    )
    return path


def full(results: Path, name: str = "세단") -> ReportPage:
    return ReportPage(
        title="demo 주차장",
        facts=[("Model", "YOLOv5n6")],
        pictures=[Picture(caption="경기도_맑음.png", image=np.full((30, 40, 3), (200, 20, 90), np.uint8))],
        class_names=[name, "cart"],
        evaluation=evaluation(name, "cart"),
        results=results,
        stages=[("Train", 402.7), ("Detect", 21.3)],
        submission=submission(name),
    )


def addresses(page: Page) -> Iterator[str]:
    """Whatever a browser would load or go to."""
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in {"src", "href", "srcset", "data", "action", "poster", "background", "formaction", "xlink:href"}:
                yield value or ""
            if name == "style":
                yield from re.findall(r"url\(([^)]*)\)", value or "")
        assert tag not in {"link", "iframe", "object", "embed", "base", "form", "a"}
    for style in page.styles:
        assert "@import" not in style
        yield from re.findall(r"url\(([^)]*)\)", style)


def test_an_empty_page_has_its_title_and_no_other_heading() -> None:
    page = Page(render_page(ReportPage(title="a run")))
    assert page.headings == ["a run"]
    assert not page.scripts and not page.tables
    assert not {"ul", "dl", "section", "figure"} & {tag for tag, _ in page.tags}


def test_a_full_page_has_every_part(results: Path) -> None:
    page = Page(render_page(full(results)))
    assert page.headings == ["demo 주차장", "Detections", "Accuracy", "Training", "Submission", "Time"]
    assert set(page.figures()) == {
        "chart-ap", "chart-losses", "chart-metrics", "chart-scores", "chart-bytes"
    }  # fmt: skip
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and set(page.figures()) <= set(ids)


@pytest.mark.parametrize(
    ("part", "heading"),
    [
        ({"pictures": ()}, "Detections"),
        ({"evaluation": None}, "Accuracy"),
        ({"results": None}, "Training"),
        ({"submission": None}, "Submission"),
        ({"stages": ()}, "Time"),
    ],
)
def test_a_part_that_is_absent_leaves_no_heading(results: Path, part: dict[str, Any], heading: str) -> None:
    whole = full(results)
    expected = [found for found in Page(render_page(whole)).headings if found != heading]
    assert Page(render_page(replace(whole, **part))).headings == expected


def test_nothing_is_loaded_from_outside(results: Path) -> None:
    text = render_page(full(results))
    page = Page(text)
    assert [address for address in addresses(page) if not address.startswith("data:image/jpeg;base64,")] == []
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policies == [
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    ]
    without_plotly = text.replace(report_charts.plotly_js(), "")
    assert "http://" not in without_plotly and "https://" not in without_plotly


def test_plotly_is_embedded_once_and_only_for_charts(results: Path) -> None:
    marker = "* plotly.js v"
    assert render_page(full(results)).count(marker) == 1
    plain = ReportPage(title="x", evaluation=evaluation(), stages=[("Train", 1.0)])
    assert render_page(plain).count(marker) == 0


def test_what_users_name_is_text_and_nothing_else(results: Path) -> None:
    evil = replace(
        full(results, EVIL),
        title=EVIL,
        facts=[(EVIL, EVIL)],
        pictures=[Picture(caption=f'"{EVIL}', image=np.zeros((4, 4, 3), np.uint8))],
        stages=[(EVIL, 1.0)],
    )
    page = Page(render_page(evil))
    assert len(page.scripts) == 2 and "</script" not in page.scripts[1] and "<script" not in page.scripts[1]
    assert "alert(1)" not in page.scripts[0]
    assert page.headings[0] == EVIL
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"] == [f'"{EVIL}']
    # plotly reads tags in its texts: they arrive there escaped once more.
    tick = page.figures()["chart-ap"]["layout"]["yaxis"]["ticktext"][0]
    assert "<" not in tick and html.unescape(tick) == f"{EVIL[:23]}…"
    texts = json.dumps(page.figures(), ensure_ascii=False)
    assert "<script" not in texts and "&lt;script&gt;" in texts


def test_the_accuracy_table_says_what_was_measured(results: Path) -> None:
    page = Page(render_page(replace(full(results), evaluation=evaluation("세단", "cart"))))
    assert page.tables[0][1:] == [
        ["all", "1,234", "5,678", "0.777", "0.666", "0.846", "0.602", "0.512"],
        ["세단", "100", "2,001", "0.900", "0.800", "0.720", "0.520", "0.420"],
        ["cart", "200", "2,002", "0.900", "0.800", "0.730", "0.530", "0.430"],
    ]
    text = " ".join(page.text)
    assert "confidence 0.313" in text and "32 pixels -, up to" in text and "96 0.432, above 0.654" in text
    data = page.figures()["chart-ap"]["data"]
    assert [trace["x"] for trace in data] == [pytest.approx([0.72, 0.73]), pytest.approx([0.42, 0.43])]


def test_a_class_without_truth_has_a_row_and_no_bar() -> None:
    measured = evaluation("van", "cart")
    unmeasured = replace(measured.per_class[1], ap=math.nan, ap50=math.nan, ap75=math.nan, precision=math.nan)
    page = Page(
        render_page(ReportPage(title="x", evaluation=replace(measured, per_class=(measured.per_class[0], unmeasured))))
    )
    assert page.tables[0][3] == ["cart", "200", "2,002", "-", "0.800", "-", "-", "-"]
    assert page.figures()["chart-ap"]["layout"]["yaxis"]["ticktext"] == ["van"]


def test_the_submission_is_in_exact_bytes_and_never_rounded_up_to_its_limit(results: Path) -> None:
    page = Page(render_page(full(results, "sedan")))
    text = " ".join(page.text)
    assert "19,999,990 bytes, limit 20,000,000; cut at score 0.0437" in text
    assert "19.99 MB" in text and "99.9 % of 20 MB" in text
    assert page.tables[2][1:] == [
        ["all", "976,050", "151,234", "15.4 %", "0.0437", "19,999,990", "100.0 %"],
        ["sedan", "900,000", "150,000", "16.6 %", "0.0437", "19,800,000", "99.0 %"],
        ["cart", "76,050", "1,234", "1.6 %", "0.0437", "199,989", "0.9 %"],
    ]
    scores = page.figures()["chart-scores"]
    assert scores["data"][0]["y"] == [900_000, 50_000, 20_000, 6_050, 0]
    assert scores["data"][0]["x"] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert [shape["x0"] for shape in scores["layout"]["shapes"]] == [0.0437]
    assert page.figures()["chart-bytes"]["data"][0]["x"] == [19_800_000, 199_989]


def test_what_is_in_the_file_stands_before_what_was_read(results: Path) -> None:
    page = Page(render_page(full(results)))
    read, kept = page.figures()["chart-scores"]["data"]
    assert (read["marker"]["color"], kept["marker"]["color"]) == (report_charts.GREY, report_charts.BLUE)
    assert kept["y"] == [75_184, 50_000, 20_000, 6_050, 0]
    assert kept["customdata"][0] == "0 to 0.2: 75,184 of 900,000 in the file"


def test_where_nothing_was_cut_no_cut_is_shown(results: Path) -> None:
    whole = replace(submission(), threshold=None, kept_count=976_050)
    page = Page(render_page(replace(full(results), submission=whole)))
    assert "shapes" not in page.figures()["chart-scores"]["layout"]
    assert "nothing was cut" in " ".join(page.text)


def test_a_submission_without_detections_has_no_charts() -> None:
    empty = SubmissionFigures(
        size_bytes=2,
        limit_bytes=20_000_000,
        kept_count=0,
        total_count=0,
        threshold=None,
        per_class=[ClassShare(category_id=1, name="van", kept_count=0, total_count=0, size_bytes=0, threshold=None)],
        score_counts=[0, 0],
        kept_score_counts=[0, 0],
    )
    page = Page(render_page(ReportPage(title="x", submission=empty)))
    assert not page.scripts
    assert page.tables[0][1:] == [
        ["all", "0", "0", "-", "-", "2", "100.0 %"],
        ["van", "0", "0", "-", "-", "0", "0.0 %"],
    ]


def test_pictures_are_inline_with_alternative_texts_and_a_legend(results: Path) -> None:
    page = Page(render_page(full(results)))
    [image] = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["alt"] == "경기도_맑음.png" and (image["width"], image["height"]) == ("40", "30")
    encoded = base64.b64decode((image["src"] or "").removeprefix("data:image/jpeg;base64,"))
    pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None and pixels.shape == (30, 40, 3)
    assert (np.abs(pixels.astype(int) - (200, 20, 90)) < 6).all()
    # 세단 cannot be written into a picture: the legend tells its number.
    assert "#0" in page.text and "#1" not in page.text
    assert "dashed" not in "".join(page.text)
    shown = replace(full(results), pictures=[replace(full(results).pictures[0], shows_truth=True)])
    assert "dashed: true boxes" in "".join(Page(render_page(shown)).text)


def test_large_pictures_are_reduced_in_their_proportions() -> None:
    large = Picture(caption="x", image=np.zeros((1080, 1920, 3), np.uint8))
    [image] = [a for tag, a in Page(render_page(ReportPage(title="x", pictures=[large]))).tags if tag == "img"]
    assert (image["width"], image["height"]) == ("1600", "900")


def test_the_time_bar_and_its_table(results: Path) -> None:
    page = Page(render_page(replace(full(results), stages=[("Train", 402.7), ("Detect", 21.3), ("Submit", 3723.0)])))
    assert page.tables[-1][1:] == [
        ["Train", "6 min 43 s", "9.7 %"],
        ["Detect", "21.3 s", "0.5 %"],
        ["Submit", "1 h 02 min", "89.7 %"],
    ]
    styles = [a.get("style") for tag, a in page.tags if tag == "i"]
    assert styles == ["--share: 402.7", "--share: 21.3", "--share: 3723.0"]
    assert "1 h 09 min" in " ".join(page.text)


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_a_stage_takes_a_number_of_seconds(seconds: float) -> None:
    with pytest.raises(ValueError, match="'Train' took"):
        render_page(ReportPage(title="x", stages=[("Train", seconds)]))


def test_stages_that_took_no_time_have_no_bar() -> None:
    page = Page(render_page(ReportPage(title="x", stages=[("Train", 0.0)])))
    assert page.tables[0][1:] == [["Train", "0.0 s", "-"]]
    assert not [tag for tag, _ in page.tags if tag == "i"]


def test_epochs_are_plotted_and_listed(results: Path) -> None:
    page = Page(render_page(ReportPage(title="x", results=results)))
    losses = {trace["name"]: trace["y"] for trace in page.figures()["chart-losses"]["data"]}
    assert losses == {"box, train": [0.11, 0.091], "obj, train": [0.07, 0.061], "box, val": [None, 0.12]}
    metrics = {trace["name"]: trace["y"] for trace in page.figures()["chart-metrics"]["data"]}
    assert metrics == {
        "mAP@.5": [None, 0.4567], "mAP@[.5:.95]": [None, 0.2345], "precision": [None, 0.52], "recall": [None, 0.43]
    }  # fmt: skip
    assert page.tables[0] == [
        HEADER.strip().split(","),
        ["0", "0.11", "0.07", "-", "-", "-", "-", "-", "0.01"],
        ["1", "0.091", "0.061", "0.52", "0.43", "0.4567", "0.2345", "0.12", "0.009"],
    ]


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.csv: no such file"):
        render_page(ReportPage(title="x", results=tmp_path / "nowhere.csv"))
    with pytest.raises(UsageError, match="absent: no such folder"):
        write_page(ReportPage(title="x"), tmp_path / "absent" / "page.html")


def test_the_file_is_the_page_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "보고서.html"
    path.write_text("old")
    page = ReportPage(title="주차장", facts=[("file", b"\xff.png".decode(errors="surrogateescape"))])
    write_page(page, path)
    text = path.read_text(encoding="utf-8")
    assert "주차장" in text and "\\udcff.png" in text
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_page(ReportPage(title="x"), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (3599.7, "1 h 00 min"), (36 * 3600 + 61, "36 h 01 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert report_page._duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (19_999_999, "19.99 MB"), (2_500_000_000, "2.5 GB")]
)
def test_sizes_are_rounded_down(size: int, text: str) -> None:
    assert report_page._size(size) == text
