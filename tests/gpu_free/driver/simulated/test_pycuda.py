"""The example with pycuda runs on the simulated driver, unchanged."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import cv2
import pytest

from tests.gpu_free.driver.simulated.engines import make_engine, picture
from tests.gpu_free.driver.simulated.tensorrt_double import tensorrt_double
from tests.runtime.conftest import TinyModel


def test_images_that_pycuda_put_on_the_device(
    simulation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    why = "pycuda cannot be imported (it comes as source, and needs a CUDA toolkit to be compiled)"
    pytest.importorskip("pycuda.driver", reason=why, exc_type=ImportError)
    double = tensorrt_double("11")
    monkeypatch.setitem(sys.modules, double.__name__, double)
    engine = make_engine(tmp_path / "tiny.engine", TinyModel.random())
    cv2.imwrite(str(tmp_path / "lot.png"), picture(64, 96, 3))
    example = Path(__file__).parents[4] / "examples" / "pycuda_images.py"
    monkeypatch.setattr(sys, "argv", [str(example), str(engine), str(tmp_path / "lot.png")])
    runpy.run_path(str(example), run_name="__main__")
    told = capsys.readouterr().out
    assert "lot.png: " in told
    assert told.count("\n") > 1
    simulation.forget()  # pycuda gives back at the end of the process
