"""Headers against cv2: the size that decoding gives is the size that the header must say."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from parkdet.runtime.image_headers import ImageHeader, Problem, read_header

HEIGHT, WIDTH = 37, 53
PIXELS = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def encoded(extension: str, image: NDArray[Any] = PIXELS, *parameters: int) -> bytes:
    done, content = cv2.imencode(extension, image, list(parameters))
    assert done
    return content.tobytes()


def tiff_with_orientation(value: int, order: str = "<", thumbnail: bytes = b"") -> bytes:
    """A TIFF block: an unrelated entry, the orientation, a second directory that claims another one."""
    mark = b"II" if order == "<" else b"MM"
    first = struct.pack(order + "H", 2)
    first += struct.pack(order + "HHIHH", 0x0100, 3, 1, 7, 0)
    first += struct.pack(order + "HHIHH", 0x0112, 3, 1, value, 0)
    first += struct.pack(order + "I", 8 + 2 + 24 + 4)
    second = struct.pack(order + "HHHIHH", 1, 0x0112, 3, 1, 9 - value, 0) + struct.pack(order + "I", 0)
    return mark + struct.pack(order + "HI", 42, 8) + first + second + thumbnail


def jpeg_with(*segments: bytes) -> bytes:
    plain = encoded(".jpg")
    return plain[:2] + b"".join(segments) + plain[2:]


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def webp_with(exif: bytes) -> bytes:
    """An extended file with the EXIF chunk behind the pixels."""
    pixels = encoded(".webp", PIXELS, cv2.IMWRITE_WEBP_QUALITY, 80)[12:]
    canvas = struct.pack("<I", 0x08) + (WIDTH - 1).to_bytes(3, "little") + (HEIGHT - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + pixels
    body += b"EXIF" + struct.pack("<I", len(exif)) + exif + b"\0" * (len(exif) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def read(tmp_path: Path, content: bytes) -> ImageHeader:
    path = tmp_path / "그림 a.b.png"
    path.write_bytes(content)
    return read_header(path)


def assert_as_decoded(tmp_path: Path, content: bytes, image_format: str) -> ImageHeader:
    header = read(tmp_path, content)
    decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    assert header.problem is None
    assert (header.format, header.height, header.width) == (image_format, *decoded.shape[:2])
    return header


def test_zero_bytes(tmp_path: Path) -> None:
    header = read(tmp_path, b"")
    assert header.kind is Problem.EMPTY
    assert header.problem == "has zero bytes"


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_of_every_depth(tmp_path: Path, depth: type, channels: int) -> None:
    image: NDArray[Any] = np.full((HEIGHT, WIDTH, channels), 90, depth)
    assert_as_decoded(tmp_path, encoded(".png", image), "PNG")


def test_interlaced_palette_png(tmp_path: Path) -> None:
    # 1 x 1 pixel, Adam7, 2 bit palette: small enough to write by hand.
    content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 2, 3, 0, 0, 1))
    content += png_chunk(b"PLTE", bytes(12)) + png_chunk(b"IDAT", zlib.compress(b"\0\0"))
    assert_as_decoded(tmp_path, content + png_chunk(b"IEND", b""), "PNG")


@pytest.mark.parametrize(
    ("extension", "parameters", "image_format"),
    [
        (".jpg", (), "JPEG"),
        (".jpg", (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), "JPEG"),
        (".bmp", (), "BMP"),
        (".webp", (cv2.IMWRITE_WEBP_QUALITY, 80), "WebP"),
        (".webp", (cv2.IMWRITE_WEBP_QUALITY, 101), "WebP"),
    ],
)
def test_other_formats(tmp_path: Path, extension: str, parameters: tuple[int, ...], image_format: str) -> None:
    assert_as_decoded(tmp_path, encoded(extension, PIXELS, *parameters), image_format)


def test_bmp_stored_from_the_top(tmp_path: Path) -> None:
    content = bytearray(encoded(".bmp"))
    struct.pack_into("<i", content, 22, -HEIGHT)
    assert_as_decoded(tmp_path, bytes(content), "BMP")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation_as_cv2_applies_it(tmp_path: Path, value: int, order: str) -> None:
    tiff = tiff_with_orientation(value, order)
    header = assert_as_decoded(tmp_path, jpeg_with(segment(0xE1, b"Exif\0\0" + tiff)), "JPEG")
    assert header.orientation == value

    png = encoded(".png")
    early = png[:33] + png_chunk(b"eXIf", tiff) + png[33:]
    late = png[:-12] + png_chunk(b"eXIf", tiff) + png[-12:]
    assert assert_as_decoded(tmp_path, early, "PNG").orientation == value
    assert assert_as_decoded(tmp_path, late, "PNG").orientation == value

    assert assert_as_decoded(tmp_path, webp_with(tiff), "WebP").orientation == value
    # cv2 takes the block only as the format defines it.
    assert_as_decoded(tmp_path, webp_with(b"Exif\0\0" + tiff), "WebP")


def test_segments_of_more_than_64_kb_and_a_thumbnail_do_not_confuse(tmp_path: Path) -> None:
    thumbnail = encoded(".jpg", PIXELS[:8, :8])
    exif = segment(0xE1, b"Exif\0\0" + tiff_with_orientation(6, thumbnail=thumbnail))
    profile = segment(0xE2, b"ICC_PROFILE\0" + bytes(65_000))
    xmp = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"x" * 60_000)
    content = jpeg_with(xmp, profile, profile, b"\xff\xff\xff", exif, segment(0xFE, thumbnail))
    header = assert_as_decoded(tmp_path, content, "JPEG")
    assert (header.width, header.height) == (HEIGHT, WIDTH)
    # Cut inside the comment that holds a whole JPEG: its end marker is not the picture's.
    cut = content[: content.rindex(thumbnail) + len(thumbnail)]
    assert cut.endswith(b"\xff\xd9")
    assert read(tmp_path, cut).kind is Problem.TRUNCATED_HEAD
    in_scan = content[: content.rindex(b"\xff\xda") + 40]
    assert b"\xff\xd9" in in_scan[-4096:]
    assert read(tmp_path, in_scan).kind is Problem.TRUNCATED_TAIL


def test_which_of_several_orientations_counts(tmp_path: Path) -> None:
    normal, turned = (segment(0xE1, b"Exif\0\0" + tiff_with_orientation(value)) for value in (1, 6))
    for segments in ((normal, turned), (turned, normal), (segment(0xE1, b"Exif\0\0"), turned)):
        assert_as_decoded(tmp_path, jpeg_with(*segments), "JPEG")
    plain = encoded(".jpg")
    tables = plain.index(b"\xff\xc4")  # behind the frame's header
    assert assert_as_decoded(tmp_path, plain[:tables] + turned + plain[tables:], "JPEG").orientation == 6


@pytest.mark.parametrize("extension", [".png", ".jpg", ".bmp", ".webp"])
def test_every_cut_is_found(tmp_path: Path, extension: str) -> None:
    content = encoded(extension)
    step = max(len(content) // 400, 1)
    cuts = [*range(64), *range(64, len(content), step), len(content) - 1]
    path = tmp_path / "cut"
    kinds = set()
    for end in cuts:
        path.write_bytes(content[:end])
        header = read_header(path)
        assert header.problem is not None, end
        kinds.add(header.kind)
        if end >= len(content) // 2:
            assert header.kind is Problem.TRUNCATED_TAIL
            assert (header.width, header.height) == (WIDTH, HEIGHT)
    assert {Problem.EMPTY, Problem.TRUNCATED_HEAD, Problem.TRUNCATED_TAIL} <= kinds


@pytest.mark.parametrize("extension", [".png", ".jpg", ".webp", ".bmp"])
@pytest.mark.parametrize("surplus", [b"\0", b"\r\n" * 4, b"\0" * 10_000, b"SEFT" + bytes(range(256)) * 36])
def test_bytes_behind_the_end_are_tolerated(tmp_path: Path, extension: str, surplus: bytes) -> None:
    header = read(tmp_path, encoded(extension) + surplus)
    assert header.problem is None
    assert (header.width, header.height) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("before", [0, 1, 2, 1000, 2**20])
def test_the_end_is_found_wherever_it_stands(tmp_path: Path, before: int) -> None:
    """Searched a mebibyte at a time: the marker may lie across two of them."""
    content = encoded(".jpg")
    scan = content.index(b"\xff\xda") + 14
    middle = bytes(2**20 - 1 - scan + before)
    assert read(tmp_path, content[:scan] + middle + b"\xff\xd9" + bytes(9_000)).problem is None
    assert read(tmp_path, content[:scan] + middle + bytes(9_000)).kind is Problem.TRUNCATED_TAIL


@pytest.mark.parametrize("extension", [".png", ".jpg"])
def test_a_tail_of_zeros_is_a_cut(tmp_path: Path, extension: str) -> None:
    content = encoded(extension)
    half = len(content) // 2
    assert read(tmp_path, content[:half] + bytes(half + 9_000)).kind is Problem.TRUNCATED_TAIL


@pytest.mark.parametrize(
    "content",
    [
        b"a",
        b"<html>404</html>",
        b"GIF89a" + bytes(50),
        b"BM" + b"text that begins like a bitmap" * 3,
        bytes(500),
    ],
)
def test_not_an_image(tmp_path: Path, content: bytes) -> None:
    header = read(tmp_path, content)
    assert header.kind is Problem.NOT_AN_IMAGE
    assert (header.width, header.height) == (0, 0)


def test_a_damaged_header(tmp_path: Path) -> None:
    content = bytearray(encoded(".png"))
    content[18] ^= 1  # the width no longer agrees with the chunk's checksum
    assert read(tmp_path, bytes(content)).kind is Problem.DAMAGED_HEAD
    assert read(tmp_path, b"\xff\xd8\xff\xe0\0\x04ab" + bytes(90)).kind is Problem.DAMAGED_HEAD


@pytest.mark.parametrize(("at", "value", "why"), [(4, 12, "12 bits"), (1, 0xC3, "lossless"), (1, 0xC5, "hierarchical")])
def test_a_jpeg_that_no_decoder_here_knows_is_told_from_a_damaged_one(
    tmp_path: Path, at: int, value: int, why: str
) -> None:
    content = bytearray(encoded(".jpg"))
    content[content.index(b"\xff\xc0") + at] = value
    assert cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) is None
    header = read(tmp_path, bytes(content))
    assert header.kind is Problem.NOT_DECODED
    assert why in (header.problem or "")


def test_a_file_too_large_to_decode_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sparse.jpg"
    path.write_bytes(encoded(".jpg"))
    assert read_header(path).file_bytes == path.stat().st_size
    os.truncate(path, 2**31)
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("read"))
    assert read_header(path).kind is Problem.TOO_LARGE


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    assert read_header(tmp_path / "absent.png").kind is Problem.MISSING
    assert read_header(tmp_path / "pipe.png").kind is Problem.UNREADABLE
    assert read_header(tmp_path / "folder.png").kind is Problem.UNREADABLE
    assert read_header("a\0b.png").kind is Problem.UNREADABLE


def test_a_large_image_is_read_at_both_ends_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(".png", np.random.default_rng(1).integers(0, 255, (500, 900, 3), dtype=np.uint8))
    assert len(content) > 1_000_000
    path = tmp_path / "large.png"
    path.write_bytes(content)
    fetched: list[int] = []
    pread = os.pread

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        content = pread(descriptor, count, offset)
        fetched.append(len(content))
        return content

    monkeypatch.setattr(os, "pread", counted)
    assert read_header(path).problem is None
    assert sum(fetched) <= 10_000
