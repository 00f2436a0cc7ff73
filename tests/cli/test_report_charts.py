"""What the report reads from a results.csv."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from parkdet.cli import report_charts
from parkdet.cli.report_page import ReportPage, render_page
from parkdet.runtime.errors import DataError


@pytest.mark.parametrize("content", ["", "epoch,train/box_loss\n", "\n\n"])
def test_results_without_a_row_have_no_part(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(content)
    assert report_charts.read_results(path) is None
    page = render_page(ReportPage(title="x", results=path))
    assert "<section" not in page and "<script" not in page


def test_results_as_yolov5_pads_them_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("               epoch,      train/box_loss\n                   0,            0.042\n   1,  nan\n")
    found = report_charts.read_results(path)
    assert found is not None
    assert (found.epochs, found.columns) == ((0, 1), {"train/box_loss": (0.042, None)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", ":1: the columns"),
        ("epoch,a,a\n1,2,3\n", ":1: the columns"),
        ("epoch,a\n0,1\n1\n", ":3: has 1 cells for 2 columns"),
        ("epoch,a\n0,0.1x\n", ":2: a is '0.1x', not a number"),
        ("epoch,a\n0.5,1\n", "not a whole number"),
        ("epoch,a\n,1\n", "not a whole number"),
        (b"epoch,\xff\xfe\n", "is not UTF-8"),
    ],
)
def test_damaged_results_are_told_with_their_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=re.escape(f"{path}") + ".*" + re.escape(message)):
        report_charts.read_results(path)
