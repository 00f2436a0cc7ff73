"""Image files: what OpenCV decodes, checked before, with errors that name the file."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from parkdet.runtime.errors import DataError, UsageError
from parkdet.runtime.geometry import ImageArray, Letterbox
from parkdet.runtime.image_headers import read_header
from parkdet.runtime.images import list_images, read_image, reduction
from parkdet.runtime.loading import ImageItem, LoadedImage, load_image

Picture = Callable[..., ImageArray]


def _png_with_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1", "CMYK", "I;16"])
def test_every_pixel_layout_becomes_what_cv2_makes_of_it(tmp_path: Path, picture: Picture, mode: str) -> None:
    rgb = Image.fromarray(picture(31, 47))
    image = Image.fromarray(np.asarray(rgb.convert("L"), np.uint16) * 257) if mode == "I;16" else rgb.convert(mode)
    path = tmp_path / ("주간.실외 1.jpg" if mode == "CMYK" else "주간.실외 1.png")
    image.save(path)
    pixels = read_image(path)
    assert pixels.shape == (31, 47, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, cv2.imread(os.fspath(path), cv2.IMREAD_COLOR))
    if mode in ("RGB", "P", "1", "L", "I;16"):  # an independent decoder, where both mean the same thing
        other = rgb.convert("L" if mode == "I;16" else mode).convert("RGB")
        np.testing.assert_array_equal(pixels[:, :, ::-1], np.asarray(other))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, picture: Picture, orientation: int) -> None:
    from PIL import ImageOps

    image = Image.fromarray(picture(24, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    np.testing.assert_array_equal(read_image(path)[:, :, ::-1], np.asarray(upright))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("zero.png", b"", "zero bytes"),
        ("text.jpg", b"this is a text, not a picture\n" * 9, "not a PNG"),
        ("huge.png", _png_with_size(30_000, 30_000), "900,000,000 pixels"),
        ("damaged.png", _png_with_size(64, 64), "damaged"),
    ],
)
def test_what_is_no_image_is_refused_with_file_and_reason(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_image(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: does not exist"):
        read_image(tmp_path / "gone.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.97])
def test_a_truncated_file_is_refused(tmp_path: Path, picture: Picture, suffix: str, keep: float) -> None:
    encoded = cv2.imencode(suffix, picture(90, 120))[1].tobytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(encoded[: int(len(encoded) * keep)])
    with pytest.raises(DataError, match=f"cut{suffix}: is cut off"):
        read_image(path)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, picture: Picture) -> None:
    """Its ends were seen whole; what is read then must be that file. Half a JPEG decodes, the rest of it grey."""
    path = tmp_path / "growing.jpg"
    whole = cv2.imencode(".jpg", picture(90, 120))[1].tobytes()
    path.write_bytes(whole)
    header = read_header(path)
    assert read_image(path, header=header).shape == (90, 120, 3)
    for now in (whole[: len(whole) // 2], whole + b"x", b""):
        path.write_bytes(now)
        with pytest.raises(DataError, match=r"growing\.jpg: was changed while it was read"):
            read_image(path, header=header)
    path.unlink()
    with pytest.raises(DataError, match=r"growing\.jpg: cannot be read \(No such file"):
        read_image(path, header=header)


def test_a_file_that_does_not_fit_into_memory_is_refused(
    tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError("Unable to allocate 1 GiB")

    cv2.imwrite(os.fspath(tmp_path / "a.png"), picture(9, 9))
    monkeypatch.setattr(np, "fromfile", full)
    with pytest.raises(DataError, match=r"a\.png: cannot be read \(Unable to allocate"):
        read_image(tmp_path / "a.png")


def test_large_images_are_decoded_one_at_a_time(
    tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen threads with the largest that is allowed would hold 45 GB."""
    path = tmp_path / "a.png"
    cv2.imwrite(os.fspath(path), picture(20, 30))
    at_once, most = [], []
    decode = cv2.imdecode

    def watched(*arguments: Any) -> Any:
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.02)
        at_once.pop()
        return decode(*arguments)

    monkeypatch.setattr(cv2, "imdecode", watched)
    item = ImageItem(image_id=1, file_name="a.png", path=path)

    def load(_: int) -> LoadedImage:
        return load_image(item, 0, lambda image_hw: Letterbox.fit(image_hw, 64, 32), True)

    for large, expected in ((10**6, 4), (500, 1)):
        monkeypatch.setattr("parkdet.runtime.loading._LARGE_PIXELS", large)
        most.clear()
        with ThreadPoolExecutor(4) as pool:
            assert all(loaded.reason == "" for loaded in pool.map(load, range(8)))
        assert max(most) == expected


def test_the_pixel_limit_counts_pixels_and_decodes_nothing(
    tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(os.fspath(path), picture(10, 20))
    assert read_image(path, max_pixels=200).shape == (10, 20, 3)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="20 x 10 is 200 pixels, more than the limit of 199"):
        read_image(path, max_pixels=199)


def test_a_folder_lists_its_images_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no images"):
        list_images(tmp_path)
    for name in ("b.PNG", "a.jpg", "a.b.jpeg", "notes.txt", "._a.jpg", ".png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.b.jpeg", "a.jpg", "b.PNG"]
    assert list_images(tmp_path / "a.jpg") == [tmp_path / "a.jpg"]


def test_images_of_other_formats_are_listed_so_that_they_are_told(tmp_path: Path) -> None:
    for name in ("scan.TIFF", "moving.gif"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = list_images(tmp_path)
    assert [path.name for path in found] == ["moving.gif", "scan.TIFF"]
    for path in found:
        with pytest.raises(DataError, match="is not a PNG, JPEG, BMP or WebP image"):
            read_image(path)


def test_decoders_do_not_write_to_the_terminal_and_everything_else_does(tmp_path: Path, picture: Picture) -> None:
    profile = io.BytesIO()
    Image.fromarray(picture(20, 20)).save(profile, "PNG", icc_profile=b"\0" * 200)
    (tmp_path / "profile.png").write_bytes(profile.getvalue())
    (tmp_path / "damaged.png").write_bytes(_png_with_size(64, 64))
    program = (
        "import os, sys\n"
        "from parkdet.runtime.images import read_image\n"
        "from parkdet.runtime.terminal import quiet_decoders\n"
        "from parkdet.runtime.errors import DataError\n"
        "with quiet_decoders():\n"
        "    read_image('profile.png')\n"
        "    try: read_image('damaged.png')\n"
        "    except DataError: print('from python', file=sys.stderr)\n"
        "    os.write(2, b'from a library\\nwithout an end')\n"
        "print('after', file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "libpng" not in done.stderr
    for line in ("from python", "from a library", "without an end", "after"):
        assert line in done.stderr
    # The same without the block, so that the test would notice a decoder that has become silent by itself.
    loud = program.replace("with quiet_decoders():", "if True:")
    done = subprocess.run([sys.executable, "-c", loud], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "libpng" in done.stderr


@pytest.mark.parametrize(
    ("image_hw", "least_hw", "part"),
    [
        ((1080, 1920), (360, 640), 2),
        ((1080, 1920), (720, 1280), 1),
        ((1080, 1920), (540, 960), 2),
        ((1080, 1920), (541, 960), 1),
        ((750, 1000), (120, 160), 4),
        ((540, 960), (45, 80), 8),
        ((481, 641), (241, 321), 2),  # halves are rounded up
        ((481, 641), (242, 321), 1),
        ((480, 640), (480, 640), 1),
        ((100, 100), (640, 640), 1),
        ((1, 999), (1, 100), 8),
    ],
)
def test_a_jpeg_is_decoded_smaller_only_where_enough_is_left(
    tmp_path: Path, picture: Picture, image_hw: tuple[int, int], least_hw: tuple[int, int], part: int
) -> None:
    assert reduction(image_hw, least_hw) == part
    pixels = picture(*image_hw)
    jpeg, png = tmp_path / "image.jpg", tmp_path / "image.png"
    Image.fromarray(pixels).save(jpeg, quality=95)
    assert read_image(jpeg, least_hw=least_hw).shape == (-(-image_hw[0] // part), -(-image_hw[1] // part), 3)
    Image.fromarray(pixels).save(png)
    assert read_image(png, least_hw=least_hw).shape == pixels.shape


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_decoded_smaller_is_the_average_of_its_pixels(
    tmp_path: Path, picture: Picture, mode: str, orientation: int
) -> None:
    path = tmp_path / "image.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(96, 160)).convert(mode).save(path, quality=95, subsampling=0, exif=exif)
    whole = read_image(path)
    for part in (2, 4, 8):
        least_hw = (whole.shape[0] // part, whole.shape[1] // part)
        averages = whole.reshape(least_hw[0], part, least_hw[1], part, 3).mean(axis=(1, 3))
        difference = np.abs(read_image(path, least_hw=least_hw) - averages)
        # Blocks are cut off at other frequencies than an average's, and rounded.
        assert difference.mean() < 2
