"""Engines of TensorRT for RTX, built for real, with their sidecars; skipped where it is not installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from parkdet.export import engine_export
from parkdet.export.config import EngineOptions, ExportOptions, GraphOptions
from parkdet.export.exporter import export_artifacts
from parkdet.export.graph import build_graph, serialized
from parkdet.runtime import engine_sidecar
from parkdet.runtime.errors import ArtifactError
from parkdet.train import load_checkpoint, save_checkpoint
from parkdet.train.model.network import Yolov5
from tests.conftest import RunCli

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed (extra 'rtx')"
)


@pytest.fixture(scope="module")
def folder(network: Yolov5, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("engines")
    save_checkpoint(made / "best.pt", network)
    return made


@needs_rtx
def test_engines_are_built_without_a_gpu_and_checked_by_their_sidecars(folder: Path) -> None:
    import tensorrt_rtx

    options = ExportOptions(
        weights=folder / "best.pt",
        graph=GraphOptions(precision="fp16", canvas_hw=(64, 96)),
        engine=EngineOptions(flavour="tensorrt-rtx", architectures=(75, 86, 89)),
    )
    said: list[str] = []
    written = export_artifacts(options, said.append)
    assert [path.name for path in written] == ["best.fp16.onnx", "best.sm75.engine", "best.sm86-89.engine"]
    version = tensorrt_rtx.__version__
    for engine, architecture in ((written[1], 75), (written[2], 89)):
        sidecar = engine_sidecar.check(
            engine, flavour="tensorrt-rtx", version=version, architecture=architecture, graph=written[0]
        )
        assert sidecar.spec.checkpoint_sha256 == load_checkpoint(folder / "best.pt").spec.checkpoint_sha256
        assert [(t.name, t.dtype, t.shape) for t in sidecar.spec.inputs] == [("images", "uint8", (-1, 64, 96, 3))]
        assert {t.dtype for t in sidecar.spec.outputs} == {"float16"}
        assert (sidecar.batch.high, sidecar.canvas_height.best, sidecar.canvas_width.best) == (16, 64, 96)
    with pytest.raises(ArtifactError, match=r"built for compute capability 8\.6, 8\.9, this GPU has 7\.5"):
        engine_sidecar.check(written[2], flavour="tensorrt-rtx", version=version, architecture=75)
    content = bytearray(written[1].read_bytes())
    content[len(content) // 2] ^= 1
    written[1].write_bytes(content)
    with pytest.raises(ArtifactError, match="is not the file"):
        engine_sidecar.check(written[1], flavour="tensorrt-rtx", version=version, architecture=75)
    assert not [path for path in folder.iterdir() if "pending" in path.name]
    assert json.loads((folder / "best.fp16.onnx.parity.json").read_text())["passed"]


@needs_rtx
def test_an_engine_for_other_tools_is_built_where_there_is_a_gpu_for_it(
    folder: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_export, "_runs_here", lambda _: True)
    asked = (
        "--engine",
        "tensorrt-rtx",
        "--arch",
        "86",
        "--canvas",
        "64x96",
        "--input",
        "float-nchw",
        "--head",
        "decoded",
    )
    code, _, err = run_cli("export", "--weights", folder / "best.pt", *asked)
    assert code == 0, err
    assert "not run here, parkdet runs no engine of --input float-nchw and --head decoded; its graph passed" in err


@needs_rtx
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "tensorrt-rtx", "--arch", "86,90"), "build on such a GPU with --engine tensorrt"),
        (("--engine", "tensorrt-rtx"), "--arch 75,"),
        (("--engine", "tensorrt-rtx", "--arch", "86", "--head", "plugin"), "its parser aborts on plugins"),
        (("--engine", "tensorrt-rtx", "--arch", "86", "--hardware", "ampere-plus"), "name the targets with --arch"),
        (("--engine", "tensorrt-rtx", "--arch", "86", "--precision", "int8"), "int8 is for OpenVINO"),
        (("--arch", "86"), "--arch: of use only with --engine"),
        (("--batch-size", "1-4"), "a range is for engines"),
        (("--engine", "tensorrt-rtx", "--arch", "x"), "'x' is no compute capability"),
        (("--canvas", "100x200"), "multiple of 16"),
        (("--canvas", "0x0"), "'0x0' is not HEIGHTxWIDTH"),
        (("--workspace", "much", "--engine", "tensorrt-rtx"), "'much' is no size"),
        (("--output", "x.pt"), "must end in .onnx"),
        (("--data", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_is_said_before_work_begins(
    run_cli: RunCli, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run_cli("export", "--weights", folder / "best.pt", *arguments)
    assert code == 2, err
    assert message in " ".join(err.replace("│", " ").split())
    assert out == ""
    assert "exporting" not in err


@needs_rtx
@pytest.mark.slow
def test_every_kind_of_graph_builds(network: Yolov5) -> None:
    import tensorrt_rtx as trt

    from parkdet.export.tensorrt_build import BuildSettings, build_engine
    from parkdet.runtime.engine_sidecar import ShapeRange

    built = BuildSettings(
        flavour="tensorrt-rtx", architectures=(86,), batch=ShapeRange(low=1, best=2, high=4),
        canvas_height=ShapeRange(low=64, best=64, high=96), canvas_width=ShapeRange(low=64, best=96, high=128),
    )  # fmt: skip
    for options in (
        GraphOptions(tta=True, precision="fp16", canvas_hw=(64, 96)),
        GraphOptions(precision="fp16"),
        GraphOptions(head="decoded", input_format="float-nchw", precision="fp16", canvas_hw=(64, 96)),
        GraphOptions(batch=2, canvas_hw=(64, 96)),
    ):
        graph = build_graph(network, options)
        batch, *canvas = (
            ShapeRange(low=side, best=side, high=side) if side else asked
            for side, asked in zip(
                (options.batch, *(options.canvas_hw or (None, None))),
                (built.batch, built.canvas_height, built.canvas_width),
                strict=True,
            )
        )
        settings = dataclasses.replace(built, batch=batch, canvas_height=canvas[0], canvas_width=canvas[1])
        engine = build_engine(trt, serialized(graph.model), "it", graph.spec, settings, lambda _: None)
        assert len(engine.plan) > 1000
        assert [t.name for t in engine.outputs] == [t.name for t in graph.spec.outputs]


def test_the_canvas_of_a_data_set(network: Yolov5, tmp_path: Path) -> None:
    import cv2
    import numpy as np

    from parkdet.export.canvases import canvases_of_data

    images = tmp_path / "test" / "images"
    images.mkdir(parents=True)
    for number, (height, width) in enumerate([(54, 96), (54, 96), (96, 54)]):
        cv2.imwrite(str(images / f"{number}.png"), np.zeros((height, width, 3), np.uint8))
    found = canvases_of_data(tmp_path, network.spec)
    assert dict(found.counts) == {(192, 336): 2, (336, 192): 1}
    assert found.most_frequent == (192, 336)
    assert found.bounds(0) == (192, 192, 336)
