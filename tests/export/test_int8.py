"""INT8 for OpenVINO: what is quantised, what stays in float, and that a slow one is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from parkdet.export import int8
from parkdet.export.config import ExportOptions, GraphOptions
from parkdet.export.exporter import export_artifacts
from parkdet.export.int8 import Speed
from parkdet.runtime.backends.base import open_backend
from parkdet.runtime.errors import GateError, ParkdetError
from parkdet.train import save_checkpoint
from parkdet.train.model.network import Yolov5
from tests.conftest import RunCli

needs_nncf = pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="NNCF is not installed (extra 'int8')")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(openvino, "save_model", full)
    with pytest.raises(ParkdetError, match=r"pending: cannot be written .*iostream.* MB are free\); make room"):
        int8.save(openvino.Model([], [], "it"), tmp_path / ".pending")


@needs_nncf
@pytest.mark.slow
def test_a_folder_that_the_runtime_opens_or_a_refusal_with_figures(
    network: Yolov5, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "best.pt", network)
    options = ExportOptions(weights=tmp_path / "best.pt", graph=GraphOptions(precision="int8", canvas_hw=(96, 160)))
    monkeypatch.setattr(int8, "compare_speed", lambda *_: Speed(3.0, 5.0, "fp32"))
    said: list[str] = []
    (folder,) = export_artifacts(options, said.append)
    assert folder == tmp_path / "best_int8_openvino"
    assert sorted(path.name for path in folder.iterdir()) == ["model.bin", "model.xml"]
    with open_backend(folder) as backend:
        assert backend.spec.precision == "int8"
        heads = backend.infer(np.zeros((1, 96, 160, 3), np.uint8))
        assert [head.shape for head in heads] == [(1, 3, 12, 20, 8), (1, 3, 6, 10, 8)]
    import openvino

    model = openvino.Core().read_model(folder / "model.xml")
    quantised, convolutions = int8.quantised_convolutions(model)
    assert convolutions // 2 < quantised < convolutions
    last = [result.input_value(0).get_node() for result in model.get_results()]
    assert {node.get_type_name() for node in last} == {"Transpose"}
    for node in last:
        while node.get_type_name() != "Convolution":
            node = node.input_value(0).get_node()  # noqa: PLW2901 - walks up
        assert node.input_value(0).get_node().get_type_name() != "FakeQuantize"

    monkeypatch.setattr(int8, "compare_speed", lambda *_: Speed(5.5, 5.0, "bf16"))
    before = (folder / "model.bin").read_bytes()
    with pytest.raises(GateError, match=r"not faster .*INT8 5\.5 ms an image, bf16 5\.0 ms"):
        export_artifacts(options, said.append)
    assert (folder / "model.bin").read_bytes() == before
    report = json.loads((tmp_path / "best_int8_openvino.rejected.parity.json").read_text())
    assert not report["passed"]
    assert (tmp_path / "best_int8_openvino.rejected" / "model.xml").is_file()


def test_nncf_is_missed_before_work_begins(
    network: Yolov5, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "best.pt", network)
    monkeypatch.setattr(int8, "find_spec", lambda _: None)
    code, _, err = run_cli("export", "--weights", tmp_path / "best.pt", "--precision", "int8")
    assert (code, "exporting" in err) == (2, False), err
    assert "pip install nncf" in err
