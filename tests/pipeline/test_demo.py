"""The demo on a few scenes: every part runs and leaves what it promises. How well it detects is CI's full run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from parkdet.cli import demo


@pytest.mark.slow
def test_the_demo_leaves_a_run_to_look_at(
    run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "TRAIN_IMAGES", 24)
    monkeypatch.setattr(demo, "TEST_IMAGES", 6)
    monkeypatch.setattr(demo, "PICTURES", 4)
    code, out, err = run_cli("demo", "--epochs", "1", "--project", tmp_path)
    assert code == 0, err
    folder = tmp_path / "exp"
    submission = folder / "submission.json"
    assert submission.stat().st_size < demo.LIMIT_BYTES
    assert isinstance(json.loads(submission.read_text()), list)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4
    names = [
        entry["file_name"]
        for entry in json.loads((folder / "data" / "Test_Images_Information.json").read_text())["images"]
    ]
    assert all(name in page for name in names[:4])
    assert "mAP@.5" in out
    assert str(folder / "report.html") in out
