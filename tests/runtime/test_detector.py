"""The detector as programs use it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from parkdet.runtime import Detections, Detector, Letterbox, decode_heads, non_max_suppression
from parkdet.runtime.errors import ArtifactError, DataError, UsageError
from parkdet.runtime.geometry import ImageArray

Picture = Callable[..., ImageArray]


def _same(a: Detections, b: Detections) -> None:
    np.testing.assert_array_equal(a.xyxy, b.xyxy)
    np.testing.assert_array_equal(a.scores, b.scores)
    np.testing.assert_array_equal(a.class_ids, b.class_ids)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("image_hw", [(60, 90), (333, 200), (1, 1), (20, 700)])
def test_detections_are_those_of_the_model_in_image_pixels(
    tiny_model: Any, tiny_onnx: Path, picture: Picture, backend: str, image_hw: tuple[int, int]
) -> None:
    image = picture(*image_hw)
    with Detector(tiny_onnx, conf=0.05, backend=backend, precision="fp32") as detector:
        found = detector(image)
    letterbox = Letterbox.fit(image_hw, 96, 16)
    decoded = decode_heads(tiny_model.heads(letterbox.apply(image)[None]), tiny_model.spec)[0]
    on_canvas = non_max_suppression(decoded, 0.05, 0.45, 300, multi_label=False)
    expected, _ = on_canvas.moved(letterbox.to_image(on_canvas.xyxy))
    assert len(found) == len(expected) > 0
    # The model's sums differ in the last places; a box's side may be 4 anchors of 100 pixels.
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.xyxy, expected.xyxy, atol=0.05 * max(1, max(image_hw) / 96))
    assert found.xyxy.min() >= 0
    assert (found.xyxy <= [image_hw[1], image_hw[0]] * 2).all()


def test_no_images_give_no_detections(tiny_onnx: Path) -> None:
    with Detector(tiny_onnx) as detector:
        assert detector.batch([]) == []


def test_nothing_found_is_empty_detections(tiny_onnx: Path, picture: Picture) -> None:
    with Detector(tiny_onnx, conf=1.0) as detector:
        _same(detector(picture(50, 60)), Detections.empty())


def test_paths_arrays_batches_and_folders_agree(tiny_onnx: Path, picture: Picture, tmp_path: Path) -> None:
    images = [picture(60, 90, 1), picture(90, 60, 2), picture(60, 90, 3), picture(40, 40, 4)]
    names = ["d.png", "b 나.png", "a.PNG", "c.png"]
    for name, image in zip(names, images, strict=True):
        cv2.imencode(".png", image)[1].tofile(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    with Detector(tiny_onnx, conf=0.05) as detector:
        single = [detector(image) for image in images]
        for one, other in zip(single, detector.batch(images), strict=True):
            _same(one, other)
        _same(single[1], detector(tmp_path / "b 나.png"))
        _same(single[1], detector(os.fspath(tmp_path / "b 나.png")))
        in_folder = dict(detector.folder(tmp_path))
        assert [path.name for path in in_folder] == ["a.PNG", "b 나.png", "c.png", "d.png"]
        for name, one in zip(names, single, strict=True):
            _same(in_folder[tmp_path / name], one)
        with ThreadPoolExecutor(4) as pool:
            for one, other in zip(single * 3, pool.map(detector, images * 3), strict=True):
                _same(one, other)


def test_an_unreadable_image_of_a_folder_ends_the_iteration_or_is_told(
    tiny_onnx: Path, picture: Picture, tmp_path: Path
) -> None:
    for name in ("a.png", "c.png"):
        cv2.imwrite(str(tmp_path / name), picture(60, 90))
    (tmp_path / "b.png").write_bytes(b"no image")
    told: list[tuple[str, str]] = []
    with Detector(tiny_onnx, conf=0.05) as detector:
        whole = list(detector.folder(tmp_path, on_error=lambda path, error: told.append((path.name, str(error)))))
        assert [path.name for path, _ in whole] == ["a.png", "c.png"]
        assert [name for name, _ in told] == ["b.png"]
        assert str(tmp_path / "b.png") in told[0][1]
        each = detector.folder(tmp_path)
        assert next(each)[0].name == "a.png"
        with pytest.raises(DataError, match=r"b\.png"):
            next(each)


def test_a_cpu_runs_images_one_by_one_and_a_fixed_batch_is_filled(
    tiny_model: Any, tiny_onnx: Path, tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each size of batch would be compiled anew, and a thousand images would be in memory as one batch."""
    runs: list[int] = []
    for path, expected in ((tiny_onnx, [1] * 5), (tiny_model.save(tmp_path / "b.onnx", fixed=(2, 64, 96)), [2, 2, 1])):
        with Detector(path, conf=0.05) as detector:
            backend = detector._backend
            infer = backend.infer

            def recorded(canvases: ImageArray, infer: Any = infer) -> Any:
                runs.append(len(canvases))
                return infer(canvases)

            runs.clear()
            monkeypatch.setattr(backend, "infer", recorded)
            assert len(detector.batch([picture(60, 90, seed) for seed in range(5)])) == 5
        assert runs == expected


def test_settings_reach_the_suppression(tiny_onnx: Path, picture: Picture) -> None:
    image = picture(80, 80)
    counts = {}
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "max_det": {"max_det": 2},
        "multi": {"multi_label": True},
        "agnostic": {"agnostic": True},
        "strict": {"conf": 0.4},
        "loose": {"iou": 0.95},
        "large": {"imgsz": 192},
    }
    for name, settings in cases.items():
        with Detector(tiny_onnx, **{"conf": 0.05, **settings}) as detector:
            counts[name] = len(detector(image))
    assert counts["max_det"] == 2
    assert counts["multi"] > counts["plain"] > counts["agnostic"]
    assert counts["strict"] < counts["plain"] < counts["loose"]
    assert counts["large"] > counts["plain"]


def test_a_graph_of_fixed_size_takes_every_image(tiny_model: Any, tmp_path: Path, picture: Picture) -> None:
    path = tiny_model.save(tmp_path / "fixed.onnx", fixed=(2, 64, 96))
    with Detector(path, conf=0.05) as detector:
        found = detector.batch([picture(60, 90), picture(200, 50), picture(60, 90, 1)])
    assert all(len(detections) for detections in found)
    assert (found[1].xyxy <= [50, 200, 50, 200]).all()


def test_what_cannot_be_is_refused_with_the_remedy(
    tiny_onnx: Path, tmp_path: Path, random_tiny_model: Callable[..., Any]
) -> None:
    with pytest.raises(UsageError, match="export the checkpoint again with --tta"):
        Detector(tiny_onnx, tta=True)
    claims_views = random_tiny_model(tta=True).save(tmp_path / "views.onnx")
    for tta in (True, False):
        with pytest.raises(ArtifactError, match="2 levels in 3 test-time views, 4 raw heads"):
            Detector(claims_views, tta=tta)
    (tmp_path / "best.pt").touch()
    with pytest.raises(UsageError, match=r"parkdet export --weights .*best\.pt"):
        Detector(tmp_path / "best.pt")
    with pytest.raises(UsageError, match=r"device 'tpu'.*cpu"):
        Detector(tiny_onnx, device="tpu")
    with pytest.raises(UsageError, match="conf and iou"):
        Detector(tiny_onnx, conf=1.5)
    wrong: list[tuple[str, Any]] = [
        *(("imgsz", value) for value in (0, -64, 64.0, True, "64", (), (64, 96), (64, 64, 3), np.float32(64))),
        *(("max_det", value) for value in (0, 5.5, 5.0, True, "5", None)),
        *((name, value) for name in ("conf", "iou") for value in ("0.3", None, float("nan"), 1.5, np.zeros(2))),
        *((name, value) for name in ("multi_label", "agnostic", "tta") for value in ("no", None, 2, 0.0)),
    ]
    for name, value in wrong:
        with pytest.raises(UsageError, match=f"{name}|conf and iou"):
            Detector(tiny_onnx, **{name: value})
    with pytest.raises(UsageError, match="on cuda:0"):  # as a number, too
        Detector(tiny_onnx, device=0, backend="onnxruntime")
    with pytest.raises(UsageError, match="no such file"):
        Detector(tmp_path / "none.onnx")
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(ArtifactError, match="zero bytes"):
        Detector(tmp_path / "empty.onnx")


def test_numbers_may_be_of_any_kind(tiny_onnx: Path, picture: Picture) -> None:
    with Detector(tiny_onnx, conf=0.05, iou=0.5, max_det=7, multi_label=True, imgsz=192) as detector:
        expected = detector(picture(80, 80))
    sizes: list[Any] = [np.int64(192), np.uint16(192), [192], (192, 192), np.array([192, 192])]
    for size in sizes:
        conf, iou = np.float64(0.05), np.array(0.5)
        many: Any = np.int32(7)
        with Detector(tiny_onnx, conf=conf, iou=iou, max_det=many, multi_label=np.True_, imgsz=size) as detector:  # type: ignore[arg-type]
            assert detector.imgsz == 192
            assert json.loads(json.dumps(dataclasses.asdict(detector.nms)))["max_det"] == 7
            found = detector(picture(80, 80))
        assert len(found) == 7
        assert np.array_equal(found.xyxy, expected.xyxy)


def test_a_canvas_that_no_memory_holds_is_told(tiny_onnx: Path, picture: Picture) -> None:
    with (
        Detector(tiny_onnx, imgsz=10**9) as detector,
        pytest.raises(DataError, match=r"9 x 9 cannot be scaled onto its canvas of .*imgsz is 1000000000"),
    ):
        detector(picture(9, 9))


def test_what_is_no_image_is_refused(tiny_onnx: Path, tmp_path: Path, picture: Picture) -> None:
    with Detector(tiny_onnx) as detector:
        grey, floats = picture(9, 9)[:, :, 0], picture(9, 9).astype(np.float32)
        for wrong in (grey, floats, picture(9, 9)[:0]):
            with pytest.raises(UsageError, match="BGR"):
                detector(wrong)  # type: ignore[arg-type]
        image = picture(9, 9)
        other: list[tuple[Any, str]] = [
            ([image], r"a list; .*\.batch"),
            (image[None], r"\(1, 9, 9, 3\) uint8; .*\.batch"),
            (grey, "COLOR_GRAY2BGR"),
            (Image.fromarray(image), r"a Image; of one of Pillow's: np\.asarray"),
            (b"\xff\xd8", r"bytes; .*cv2\.imdecode"),
            (None, r"None, .*cv2\.imread"),
            (3, "one of type int"),
            (np.dstack([image, grey]), "COLOR_BGRA2BGR"),
            (image.transpose(2, 0, 1)[:, :4], r"image\.transpose"),
            (image / 255, r"image \* 255"),
            (image.astype(np.uint16), "image / 257"),
        ]
        for wrong, remedy in other:
            with pytest.raises(UsageError, match=remedy):
                detector(wrong)
        for one in ("a.png", tmp_path / "a.png"):
            with pytest.raises(UsageError, match=r"batch takes several images.*a\.png"):
                detector.batch(one)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=r"several images, not one of \(9, 9, 3\)"):
            detector.batch(image)
        with pytest.raises(DataError, match="does not exist"):
            detector(tmp_path / "none.png")
        with pytest.raises(UsageError, match="holds no images"):
            detector.folder(tmp_path)
