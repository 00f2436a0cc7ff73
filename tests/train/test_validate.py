"""validate() against another chain: the plain network, `decode_heads`, `non_max_suppression`, pycocotools."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from parkdet.runtime import Letterbox, decode_heads, non_max_suppression
from parkdet.runtime.errors import DataError
from parkdet.train import DetectionLoss
from parkdet.train import validate as validate_module
from parkdet.train.config import ValSettings
from parkdet.train.data.samples import Sample
from parkdet.train.model.network import Yolov5, build_network
from parkdet.train.validate import validate

IMGSZ = 64
CATEGORIES = (3, 7, 20)
SETTINGS = ValSettings(conf=0.05, iou=0.6, max_det=20)
# Folded normalisation and other batches move scores by some 1e-6; a near-tie that turns moves AP a little.
CLOSE = 2e-3
SIZES_HW = ((90, 60), (60, 100), (64, 64), (45, 120), (100, 61), (60, 99), (30, 40))


@pytest.fixture(scope="module")
def network() -> Yolov5:
    """Random weights whose heads see the image and fire often."""
    torch.manual_seed(3)
    made = build_network("yolov5n", ["가", "b", "c"], IMGSZ, CATEGORIES)
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        made.train()
        for _ in range(10):
            made(torch.rand(4, 3, 1, 1) * torch.rand(4, 3, 64, 64))
        for conv in made.head_convs:
            assert conv.bias is not None
            bias = conv.bias.view(3, -1)
            bias[:, 4], bias[:, 5:] = -1.0, 0.0
    return made.eval()


def read(path: Path) -> Any:
    return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)


def detections_of(network: Yolov5, path: Path) -> list[tuple[list[float], float, int]]:
    """One image alone through the network as it was trained, its boxes carried back by hand."""
    image = read(path)
    letterbox = Letterbox.fit(image.shape[:2], IMGSZ, network.spec.stride_max)
    rgb = cv2.cvtColor(letterbox.apply(image), cv2.COLOR_BGR2RGB)
    with torch.no_grad():
        heads = network(torch.from_numpy(rgb.transpose(2, 0, 1)[None].astype(np.float32) / 255))
    (decoded,) = decode_heads([head.numpy() for head in heads], network.spec)
    kept = non_max_suppression(decoded, SETTINGS.conf, SETTINGS.iou, SETTINGS.max_det, True, False)
    height, width = image.shape[:2]
    sy, sx = letterbox.resized_hw[0] / height, letterbox.resized_hw[1] / width
    found = []
    for (x1, y1, x2, y2), score, class_id in kept:
        left, right = (float(min(max((x - letterbox.left) / sx, 0), width)) for x in (x1, x2))
        top, bottom = (float(min(max((y - letterbox.top) / sy, 0), height)) for y in (y1, y2))
        if right > left and bottom > top:
            found.append(([left, top, right - left, bottom - top], score, class_id))
    return found


@pytest.fixture(scope="module")
def samples(network: Yolov5, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Portraits, landscapes and a square. The truth is drawn around the network's own boxes, so that AP says much."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    made = []
    for number, (height, width) in enumerate(SIZES_HW):
        path = folder / f"그림 {number}.png"
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        path.write_bytes(cv2.imencode(".png", cv2.resize(small, (width, height)))[1].tobytes())
        boxes, class_ids = [], []
        for rank, (xywh, _, class_id) in enumerate(detections_of(network, path)):
            if rank % 3 == 0:
                x, y, w, h = np.array(xywh) + rng.normal(0, 1.5, 4)
                boxes.append([x, y, x + max(w, 2), y + max(h, 2)])
                class_ids.append(class_id if rng.random() < 0.7 else int(rng.integers(2)))
        xyxy = np.array(boxes, np.float32).reshape(-1, 4)
        made.append(Sample(1000 - number, path, (height, width), np.array(class_ids, np.int32), xyxy))
    assert sum(len(sample.class_ids) for sample in made) > 20
    return made


def pycocotools_ap(samples: list[Sample], found: dict[int, list[tuple[list[float], float, int]]]) -> Any:
    """Precision (10 IoUs, 101 recalls, classes) with all areas, at max_det."""
    annotations: list[dict[str, Any]] = []
    for sample in samples:
        for (x1, y1, x2, y2), class_id in zip(sample.xyxy.tolist(), sample.class_ids.tolist(), strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": sample.image_id, "category_id": CATEGORIES[class_id],
                 "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            )  # fmt: skip
    results = [
        {"image_id": image_id, "category_id": CATEGORIES[class_id], "bbox": box, "score": score}
        for image_id, rows in found.items()
        for box, score, class_id in rows
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": sample.image_id} for sample in samples],
            "categories": [{"id": category, "name": str(category)} for category in CATEGORIES],
            "annotations": annotations,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.params.maxDets = [1, 10, SETTINGS.max_det]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0, -1]


def mean_ap(precision: Any) -> float:
    measured = precision[precision > -1]
    return float(measured.mean()) if measured.size else 0.0  # of a class without truth


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_it_measures_what_another_chain_measures(network: Yolov5, samples: list[Sample], batch_size: int) -> None:
    precision = pycocotools_ap(samples, {s.image_id: detections_of(network, s.path) for s in samples})
    found = validate(network, samples, SETTINGS, imgsz=IMGSZ, batch_size=batch_size)
    assert found is not None
    measured = found.evaluation
    assert 0.05 < mean_ap(precision) < 0.95
    assert measured.map == pytest.approx(mean_ap(precision), abs=CLOSE)
    assert measured.map50 == pytest.approx(mean_ap(precision[0]), abs=CLOSE)
    assert measured.map75 == pytest.approx(mean_ap(precision[5]), abs=CLOSE)
    by_class = found.ap_by_class(network.spec)
    assert sum(ap > 0 for ap in by_class.values()) >= 2
    for class_id in range(3):
        assert by_class[class_id] == pytest.approx(mean_ap(precision[:, :, class_id]), abs=CLOSE)
    assert (measured.images, measured.truths) == (len(samples), sum(len(s.class_ids) for s in samples))
    assert found.unreadable == ()
    assert all(math.isnan(loss) for loss in found.losses)


def test_the_loss_is_the_mean_over_images(network: Yolov5, samples: list[Sample]) -> None:
    loss = DetectionLoss(network.spec)
    parts = []
    for sample in samples:
        image = read(sample.path)
        letterbox = Letterbox.fit(image.shape[:2], IMGSZ, network.spec.stride_max)
        rgb = cv2.cvtColor(letterbox.apply(image), cv2.COLOR_BGR2RGB)
        rows = []
        for (x1, y1, x2, y2), class_id in zip(sample.xyxy.tolist(), sample.class_ids.tolist(), strict=True):
            scale_y, scale_x = (now / was for now, was in zip(letterbox.resized_hw, sample.image_hw, strict=True))
            height, width = letterbox.canvas_hw
            cx, cy = (x1 + x2) / 2 * scale_x + letterbox.left, (y1 + y2) / 2 * scale_y + letterbox.top
            rows.append(
                [0, class_id, cx / width, cy / height, (x2 - x1) * scale_x / width, (y2 - y1) * scale_y / height]
            )
        with torch.no_grad():
            heads = network(torch.from_numpy(rgb.transpose(2, 0, 1)[None].astype(np.float32) / 255))
        parts.append(loss(heads, torch.tensor(rows).reshape(-1, 6))[1].numpy())
    found = validate(network, samples, SETTINGS, imgsz=IMGSZ, batch_size=1, loss=loss)
    assert found is not None
    assert found.losses == pytest.approx(np.mean(parts, axis=0).tolist(), rel=1e-3)


def test_a_training_goes_on_with_a_loss_that_validated_first(network: Yolov5, samples: list[Sample]) -> None:
    loss = DetectionLoss(network.spec)
    validate(network, samples[:1], SETTINGS, imgsz=IMGSZ, batch_size=1, loss=loss)
    heads = [torch.zeros(1, 3, 64 // s, 64 // s, 8, requires_grad=True) for s in network.spec.strides]
    torch.autograd.backward(loss(heads, torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.3]]))[0])
    assert all(head.grad is not None and bool(head.grad.abs().sum() > 0) for head in heads)


def test_few_canvases_wait_for_their_like(
    network: Yolov5, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = validate(network, samples, SETTINGS, imgsz=IMGSZ, batch_size=4)
    sizes: list[int] = []
    monkeypatch.setattr(validate_module, "_WAITING_BATCHES", 0.25)  # one canvas
    forward = Yolov5.forward

    def counted(self: Yolov5, images: torch.Tensor) -> list[torch.Tensor]:
        sizes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Yolov5, "forward", counted)
    found = validate(network, samples, SETTINGS, imgsz=IMGSZ, batch_size=4)
    assert found is not None
    assert plain is not None
    assert sum(sizes) == len(samples)
    assert max(sizes) <= 2
    assert found.evaluation.map == pytest.approx(plain.evaluation.map, abs=CLOSE)


def test_an_unreadable_image_counts_as_one_without_detections(
    network: Yolov5, samples: list[Sample], tmp_path: Path
) -> None:
    broken = tmp_path / "깨짐.png"
    broken.write_bytes(samples[1].path.read_bytes()[:60])
    mixed = [samples[0], dataclasses.replace(samples[1], path=broken), *samples[2:]]
    precision = pycocotools_ap(mixed, {s.image_id: detections_of(network, s.path) for s in mixed if s.path != broken})
    found = validate(network, mixed, SETTINGS, imgsz=IMGSZ, batch_size=2)
    assert found is not None
    assert found.evaluation.map == pytest.approx(mean_ap(precision), abs=CLOSE)
    assert found.evaluation.images == len(samples)
    assert len(found.unreadable) == 1
    assert str(broken) in found.unreadable[0]


def test_nothing_to_measure_with(network: Yolov5, samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image to validate"):
        validate(network, [], SETTINGS, imgsz=IMGSZ, batch_size=2)
    (tmp_path / "text.png").write_text("no image")
    unreadable = [dataclasses.replace(sample, path=tmp_path / "text.png") for sample in samples]
    with pytest.raises(DataError, match=r"none of the 7 .*text\.png"):
        validate(network, unreadable, SETTINGS, imgsz=IMGSZ, batch_size=2)


def test_images_without_any_box_have_no_ap(network: Yolov5, samples: list[Sample]) -> None:
    none = np.zeros(0, np.int32), np.zeros((0, 4), np.float32)
    background = [dataclasses.replace(sample, class_ids=none[0], xyxy=none[1]) for sample in samples]
    loss = DetectionLoss(network.spec)
    found = validate(network, background, SETTINGS, imgsz=IMGSZ, batch_size=4, loss=loss)
    assert found is not None
    assert math.isnan(found.evaluation.map)
    assert found.evaluation.truths == 0
    assert found.ap_by_class(network.spec) == {0: 0.0, 1: 0.0, 2: 0.0}
    assert found.losses[0] == found.losses[2] == 0 < found.losses[1]


def test_no_detections_are_an_ap_of_zero(network: Yolov5, samples: list[Sample]) -> None:
    found = validate(network, samples, ValSettings(conf=1.0), imgsz=IMGSZ, batch_size=4)
    assert found is not None
    assert found.evaluation.map == 0


def test_it_stops_between_batches_and_leaves_the_network_as_it_was(network: Yolov5, samples: list[Sample]) -> None:
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    try:
        assert validate(network, samples, SETTINGS, imgsz=IMGSZ, batch_size=1, stop=stop) is None
        assert network.training
    finally:
        network.eval()
    assert len(asked) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
