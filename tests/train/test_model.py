"""The network against the fixture, the published sizes, and torch's own layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from parkdet.runtime import decode_heads
from parkdet.runtime.errors import ArtifactError, UsageError
from parkdet.runtime.views import TTA_VIEWS
from parkdet.train import DetectionLoss, forward_tta, load_checkpoint
from parkdet.train.model.layout import rows_from_public
from parkdet.train.model.network import build_network, level_strides, load_architecture
from parkdet.train.model.tta import view_of

FIXTURE = "yolov5n6_nc14_official"


def close(found: object, expected: np.ndarray) -> bool:
    """The fixture's tolerance."""
    return bool((np.abs(np.asarray(found) - expected) <= 1e-4 + 1e-3 * np.abs(expected)).all())


@pytest.fixture(scope="module")
def fixture(shared: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "fixtures" / f"{FIXTURE}.npz"))


def test_the_fixtures_forward_pass(shared: Path, fixture: dict[str, np.ndarray]) -> None:
    checkpoint = load_checkpoint(shared / "fixtures" / f"{FIXTURE}.pt")
    images = torch.from_numpy(fixture["x_uint8"]).float() / 255
    with torch.no_grad():
        heads = checkpoint.model(images)
        fused = checkpoint.model.fused()(images)
    for level in range(4):
        assert close(heads[level], fixture[f"raw{level}"])
        assert close(fused[level], fixture[f"raw{level}"])
    assert close(decode_heads(heads, checkpoint.spec), fixture["decoded"])
    assert close(forward_tta(checkpoint.model, images), fixture["tta"])


def test_the_fixtures_loss_and_gradients(shared: Path, fixture: dict[str, np.ndarray]) -> None:
    model = load_checkpoint(shared / "fixtures" / f"{FIXTURE}.pt").model.train()
    images = torch.from_numpy(fixture["x_uint8"]).float() / 255
    loss, items = DetectionLoss(model.spec, box=0.0375, cls=0.065625, obj=0.12)(
        model(images), torch.from_numpy(fixture["targets"])
    )
    loss.backward()  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(loss.detach(), fixture["loss"], rtol=1e-4)
    np.testing.assert_allclose(items, fixture["loss_items"], rtol=1e-4)
    gradients = {"grad_conv0": model.first_conv.weight.grad}
    gradients |= {
        f"grad_head{level}_bias": conv.bias.grad for level, conv in enumerate(model.head_convs) if conv.bias is not None
    }
    for name, gradient in gradients.items():
        assert np.abs(np.asarray(gradient) - fixture[name]).max() <= 1e-3 * np.abs(fixture[name]).max(), name


@pytest.mark.parametrize(
    ("name", "parameters", "tolerance"),
    [
        # What the public project prints for 80 classes, and its table's millions for the larger canvases.
        ("yolov5n", 1_872_157, 0),
        ("yolov5s", 7_235_389, 0),
        ("yolov5m", 21_190_557, 0),
        ("yolov5l", 46_563_709, 0),
        ("yolov5x", 86_749_405, 0),
        ("yolov5n6", 3.2e6, 1e5),
        ("yolov5s6", 12.6e6, 1e5),
        ("yolov5m6", 35.7e6, 1e5),
        ("yolov5l6", 76.8e6, 1e5),
    ],
)
def test_published_sizes(name: str, parameters: float, tolerance: float) -> None:
    with torch.device("meta"):
        network = build_network(name, [str(i) for i in range(80)], 640)
    assert abs(network.parameter_count() - parameters) <= tolerance


def test_x6_of_the_contest_has_its_parameters() -> None:
    network = build_network("yolov5x6", [str(i) for i in range(14)], 1280)
    assert network.parameter_count() == 140_160_388
    assert network.fused().parameter_count() == 140_095_828


def test_the_levels_halve_the_image() -> None:
    network = build_network("yolov5n6", ["a", "b"], 640).eval()
    with torch.no_grad():
        shapes = [tuple(head.shape) for head in network(torch.zeros(2, 3, 128, 192))]
    assert shapes == [(2, 3, 16, 24, 7), (2, 3, 8, 12, 7), (2, 3, 4, 6, 7), (2, 3, 2, 3, 7)]
    assert level_strides(network.rows) == network.spec.strides == (8, 16, 32, 64)


def test_state_dict_names_are_the_public_ones() -> None:
    names = set(build_network("yolov5n", ["a"], 640).state_dict())
    for name in (
        "model.0.conv.weight",
        "model.0.bn.running_var",
        "model.2.m.0.cv2.bn.num_batches_tracked",
        "model.9.cv2.conv.weight",
        "model.23.cv3.conv.weight",
        "model.24.anchors",
        "model.24.m.2.bias",
    ):
        assert name in names


def test_an_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"yolov5q.*yolov5l, yolov5l6.*yolov5x6"):
        load_architecture("yolov5q")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([-1, 1, "Focus", [64, 3]], "Focus"),
        ([-1, 1, "nn.Upsample", [None, 4, "nearest"]], "nearest upsampling by 2"),
        ([-1, 1, "Conv", ["many", 3]], "cannot be understood"),
        ("Conv", "cannot be understood"),
    ],
)
def test_layers_of_other_networks_are_named(row: object, message: str) -> None:
    layout = {"depth_multiple": 1.0, "width_multiple": 1.0, "backbone": [row], "head": []}
    with pytest.raises(ArtifactError, match=f"x.pt.*{message}"):
        rows_from_public(layout, "x.pt")


def test_folded_normalisation_computes_the_same() -> None:
    torch.manual_seed(0)
    network = build_network("yolov5n", ["a", "b"], 64)
    network.train()
    for _ in range(3):
        network(torch.rand(2, 3, 64, 64))  # running statistics away from their start
    network.eval()
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for whole, fused in zip(network(image), network.fused()(image), strict=True):
            torch.testing.assert_close(whole, fused, rtol=1e-4, atol=1e-4)
    assert any(name.endswith("bn.weight") for name in network.state_dict())


def test_views_have_the_sizes_of_the_specification() -> None:
    canvas = torch.rand(1, 3, 896, 1600)
    views = [view_of(canvas, view, 64) for view in TTA_VIEWS]
    assert [tuple(view.shape[2:]) for view in views] == [(896, 1600), (768, 1344), (640, 1088)]
    # The second view is mirrored before it is scaled: its padding is on the right all the same.
    assert torch.all(views[1][..., int(1600 * 0.83) :] == 0.447)
    assert torch.all(views[2][..., int(896 * 0.67) :, :] == 0.447)
