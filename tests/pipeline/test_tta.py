"""Test-time augmentation through the runtime: what the reference computed, on every backend, and words without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from parkdet.export.config import GraphOptions
from parkdet.export.graph import build_graph
from parkdet.runtime import Detector, decode_heads, non_max_suppression
from parkdet.runtime.backends import open_backend
from parkdet.runtime.backends.base import GraphBackend
from parkdet.runtime.errors import UsageError
from parkdet.runtime.inference_report import REPORT_FILE
from parkdet.runtime.store import plans_of_images, read_predictions
from parkdet.train import load_checkpoint, save_checkpoint
from parkdet.train.model.network import build_network

RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def fixture(shared: Path) -> dict[str, NDArray[Any]]:
    with np.load(shared / "fixtures" / "yolov5n6_nc14_official.npz") as content:
        return dict(content)


@pytest.fixture(scope="module")
def graph(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's network with its three views, on the fixture's canvas."""
    checkpoint = load_checkpoint(shared / "fixtures" / "yolov5n6_nc14_official.pt")
    model = build_graph(checkpoint.model, GraphOptions(tta=True, canvas_hw=(192, 256)))
    path = tmp_path_factory.mktemp("tta") / "best.tta.onnx"
    path.write_bytes(model.model.SerializeToString())
    return path


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def backend(request: pytest.FixtureRequest, graph: Path) -> Iterator[GraphBackend]:
    with open_backend(graph, request.param, precision="fp32") as opened:
        yield opened


def test_boxes_and_survivors_are_those_of_the_reference(
    backend: GraphBackend, fixture: dict[str, NDArray[Any]]
) -> None:
    canvases = np.ascontiguousarray(fixture["x_uint8"].transpose(0, 2, 3, 1)[..., ::-1])  # RGB, NCHW
    decoded = decode_heads(backend.infer(canvases), backend.spec)
    np.testing.assert_allclose(decoded, fixture["tta"], atol=1e-4, rtol=1e-3)
    for image in range(2):
        found = non_max_suppression(decoded[image], conf=0.01, iou=0.7, max_det=50, multi_label=True)
        expected = fixture[f"nms_tta_img{image}"]
        np.testing.assert_array_equal(found.class_ids, expected[:, 5])
        np.testing.assert_allclose(found.scores, expected[:, 4], atol=1e-4)
        np.testing.assert_allclose(found.xyxy, expected[:, :4], atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("views", [1, 2])
def test_the_first_views_alone_are_the_first_boxes_of_all(
    graph: Path, fixture: dict[str, NDArray[Any]], name: str, views: int
) -> None:
    canvases = np.ascontiguousarray(fixture["x_uint8"].transpose(0, 2, 3, 1)[..., ::-1])
    with open_backend(graph, name, precision="fp32", views=views) as backend:
        decoded = decode_heads(backend.infer(canvases), backend.spec)
    # 192 x 256 at strides 8, 16, 32: 3 (24 * 32 + 12 * 16 + 6 * 8); then 192 x 256 again with stride 64 too.
    first = 3 * (24 * 32 + 12 * 16 + 6 * 8)
    assert decoded.shape[1] == (first if views == 1 else first + 3 * (24 * 32 + 12 * 16 + 6 * 8 + 3 * 4))
    np.testing.assert_allclose(decoded, fixture["tta"][:, : decoded.shape[1]], atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = build_network("yolov5n", ["a", "b"], 64)
    with torch.no_grad():
        for conv in network.head_convs:
            assert conv.bias is not None
            conv.bias.view(3, -1)[:, 4:] = 1.0
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    save_checkpoint(path, network.eval())
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(4):
        image = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), image)
    return folder


@pytest.fixture(scope="module")
def plain_graph(checkpoint: Path) -> Path:
    """The checkpoint's graph of one view."""
    path = checkpoint.with_name("plain.onnx")
    path.write_bytes(build_graph(load_checkpoint(checkpoint).model, GraphOptions()).model.SerializeToString())
    return path


def test_an_artifact_without_views_is_refused_with_the_remedy(
    run_cli: RunCli, plain_graph: Path, photographs: Path, tmp_path: Path
) -> None:
    code, _, err = run_cli(
        "infer", "--tta", "--weights", plain_graph, "--source", photographs, "--project", tmp_path / "runs"
    )
    assert code == 2
    assert "without test-time augmentation; export the checkpoint again with --tta" in err
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UsageError, match="without test-time augmentation"):
        Detector(plain_graph, tta=True)


@pytest.mark.slow
def test_a_checkpoint_is_exported_with_its_views_and_a_deadline_has_plans(
    run_cli: RunCli, checkpoint: Path, photographs: Path, tmp_path: Path
) -> None:
    command = ("infer", "--tta", "--weights", checkpoint, "--source", photographs, "--project", tmp_path / "runs")
    code, _, err = run_cli(*command)
    assert code == 0, err
    assert "best.tta.onnx on openvino" in err
    assert "3 test-time views" in err
    with Detector(checkpoint.with_name("best.tta.onnx"), conf=0.01, iou=0.7, max_det=50, multi_label=True) as detect:
        expected = [found for _, found in detect.folder(photographs)]
    frame = read_predictions(tmp_path / "runs/exp")
    np.testing.assert_array_equal(frame["score"].to_numpy(), np.concatenate([found.scores for found in expected]))

    code, out, err = run_cli(*command, "--deadline", "10m")
    assert code == 0, err
    assert checkpoint.with_name("best.onnx").is_file()
    assert "two scales at 64 px, one scale at 64 px by best.onnx" in err
    assert "Plan: 4 images, three scales at 64 px" in out
    assert set(plans_of_images(tmp_path / "runs/exp2").values()) == {"three scales at 64 px"}
    assert read_predictions(tmp_path / "runs/exp2").equals(frame)
    assert '"three scales at 64 px": 4' in (tmp_path / "runs/exp2" / REPORT_FILE).read_text()
