"""Format and size of an image file from its first and last bytes: nothing is decoded.

PNG (W3C PNG, third edition), JPEG (ITU-T T.81, EXIF 2.32), BMP and WebP (RFC 9649). A sound file costs one
open and two reads. Only what is odd is read further: long metadata, bytes after the end marker.
"""

from __future__ import annotations

import os
import stat
import zlib
from dataclasses import dataclass, replace
from enum import StrEnum
from struct import unpack_from

_WINDOW = 4096
"""Bytes read at either end of a file, and at each further stop."""
_STRIDE = 1 << 20
"""Bytes read at once where a whole file is searched."""
MAX_FILE_BYTES = 2**31 - 1
"""Above this a file is refused before it is read: OpenCV counts the bytes of what it decodes in 31 bits."""


class Problem(StrEnum):
    """What is wrong with an image file; the value completes the sentence "FILE: ..."."""

    MISSING = "does not exist"
    UNREADABLE = "cannot be read"
    EMPTY = "has zero bytes"
    NOT_AN_IMAGE = "is not a PNG, JPEG, BMP or WebP image"
    NOT_DECODED = "is of a kind that is not decoded"
    DAMAGED_HEAD = "has a damaged header"
    TOO_LARGE = f"is larger than the {MAX_FILE_BYTES:,} bytes that can be decoded"
    TRUNCATED_HEAD = "is cut off inside its header"
    TRUNCATED_TAIL = "is cut off: its end is missing"


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the ends of one image file say."""

    format: str | None
    """PNG, JPEG, BMP, WebP; None where the file is none of them."""
    width: int
    """Pixels as displayed, that is with the EXIF orientation applied, as cv2 does; 0 where unknown."""
    height: int
    orientation: int = 1
    """EXIF orientation, 1 to 8; from 5 on, width and height are stored the other way round."""
    problem: str | None = None
    """Completes the sentence "FILE: ..."; None for a file that is whole at both ends."""
    kind: Problem | None = None
    file_bytes: int = 0
    """Size of the file when its header was read; 0 where it could not be."""


class _OddError(Exception):
    """Parsing stopped; the header is of no use."""

    def __init__(self, kind: Problem, image_format: str | None = None, reason: str = "") -> None:
        super().__init__(f"{kind} ({reason})" if reason else kind)
        self.kind = kind
        self.format = image_format


class _Ends:
    """The bytes of an open file, read a window at a time."""

    __slots__ = ("_at", "_block", "fd", "head", "size", "tail")

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self.head = os.pread(fd, _WINDOW, 0)
        if size <= _WINDOW:
            self.tail = self.head
        else:
            self.tail = os.pread(fd, _WINDOW, size - _WINDOW)
        self._block, self._at = self.head, 0

    def bytes_at(self, offset: int, count: int) -> bytes:
        """`count` bytes, fewer only where the file ends."""
        start = offset - self._at
        if start < 0 or start + count > len(self._block):
            self._block, self._at, start = os.pread(self.fd, max(count, _WINDOW), offset), offset, 0
        return self._block[start : start + count]

    def find(self, marker: bytes, start: int) -> bool:
        """True when `marker` stands at or behind `start`; reads the whole file."""
        # Not by mmap: a file that another program cuts meanwhile would end this one with SIGBUS.
        while len(block := os.pread(self.fd, _STRIDE, start)) >= len(marker):
            if marker in block:
                return True
            start += len(block) - len(marker) + 1
        return False


def read_header(path: str | os.PathLike[str]) -> ImageHeader:
    """Format, displayed size and state of one image file; what is wrong is told, never raised."""
    try:
        return _read(path)
    except FileNotFoundError:
        odd = _OddError(Problem.MISSING)
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the name
        odd = _OddError(Problem.UNREADABLE, reason=getattr(error, "strerror", None) or str(error))
    except _OddError as error:
        odd = error
    return ImageHeader(odd.format, 0, 0, 1, str(odd), odd.kind)


def _read(path: str | os.PathLike[str]) -> ImageHeader:
    # A pipe under an image's name would block without O_NONBLOCK; on files the flag does nothing.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _OddError(Problem.UNREADABLE, reason="it is not a regular file")
        if status.st_size == 0:
            raise _OddError(Problem.EMPTY)
        if status.st_size > MAX_FILE_BYTES:
            raise _OddError(Problem.TOO_LARGE)
        return replace(_parse(_Ends(fd, status.st_size)), file_bytes=status.st_size)
    finally:
        os.close(fd)


def _parse(ends: _Ends) -> ImageHeader:
    head = ends.head
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(ends)
    if head.startswith(b"\xff\xd8"):
        return _jpeg(ends)
    if head.startswith(b"BM"):
        return _bmp(ends)
    if head.startswith(b"RIFF") and b"WEBP".startswith(head[8:12]):
        return _webp(ends)
    if len(head) < 8 and b"\x89PNG\r\n\x1a\n".startswith(head):
        raise _OddError(Problem.TRUNCATED_HEAD, "PNG")
    raise _OddError(Problem.NOT_AN_IMAGE)


def _whole(image_format: str, width: int, height: int, orientation: int, complete: bool) -> ImageHeader:
    """The header of a file whose size is known, complete or cut off at its end."""
    if width < 1 or height < 1:
        raise _OddError(Problem.DAMAGED_HEAD, image_format)
    if orientation >= 5:
        width, height = height, width
    kind = None if complete else Problem.TRUNCATED_TAIL
    return ImageHeader(image_format, width, height, orientation, kind and kind.value, kind)


_IEND = b"\0\0\0\0IEND\xaeB`\x82"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def _png(ends: _Ends) -> ImageHeader:
    head = ends.head
    if len(head) < 33:
        raise _OddError(Problem.TRUNCATED_HEAD, "PNG")
    length, chunk, width, height, depth, colour = unpack_from(">I4sIIBB", head, 8)
    if (
        (length, chunk) != (13, b"IHDR")
        or depth not in _PNG_DEPTHS.get(colour, ())
        or zlib.crc32(head[12:29]) != unpack_from(">I", head, 29)[0]
    ):
        raise _OddError(Problem.DAMAGED_HEAD, "PNG")
    orientation, offset = 1, 33
    while True:
        start = ends.bytes_at(offset, 8)
        if len(start) < 8:
            raise _OddError(Problem.TRUNCATED_HEAD, "PNG")
        length, chunk = unpack_from(">I4s", start)
        if chunk == b"IDAT":
            break
        if not chunk.isalpha() or chunk == b"IEND":
            raise _OddError(Problem.DAMAGED_HEAD, "PNG")
        if chunk == b"eXIf":
            orientation = _exif_orientation(ends.bytes_at(offset + 8, min(length, 1 << 16))) or 1
        offset += length + 12
    if orientation == 1 and (at := ends.tail.find(b"eXIf")) >= 4:
        # Some writers put it behind the pixels, and cv2 obeys it there too.
        (length,) = unpack_from(">I", ends.tail, at - 4)
        body = ends.tail[at : at + 4 + length]
        crc = ends.tail[at + 4 + length : at + 8 + length]
        if zlib.crc32(body).to_bytes(4, "big") == crc:
            orientation = _exif_orientation(body[4:]) or 1
    complete = ends.tail.endswith(_IEND) or _png_chunks_reach_end(ends, offset)
    return _whole("PNG", width, height, orientation, complete)


def _png_chunks_reach_end(ends: _Ends, offset: int) -> bool:
    """Walk the chunks from the first IDAT on: for files with other bytes behind IEND."""
    while len(start := os.pread(ends.fd, 12, offset)) == 12:
        if start == _IEND:
            return True
        length, chunk = unpack_from(">I4s", start)
        if not chunk.isalpha():
            return False
        offset += length + 12
    return False


_JPEG_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD8)))
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_NOT_DECODED = _JPEG_FRAMES - {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
"""Frames of the lossless and the hierarchical processes, which libjpeg does not know."""


def _jpeg(ends: _Ends) -> ImageHeader:
    width = height = 0
    orientation: int | None = None
    offset = 2
    while True:
        start = ends.bytes_at(offset, 4)
        if len(start) < 4:
            raise _OddError(Problem.TRUNCATED_HEAD, "JPEG")
        if start[0] != 0xFF:
            raise _OddError(Problem.DAMAGED_HEAD if offset > 2 else Problem.NOT_AN_IMAGE, "JPEG")
        marker = start[1]
        if marker == 0xFF:  # a fill byte
            offset += 1
            continue
        if marker in _JPEG_WITHOUT_LENGTH:
            offset += 2
            continue
        length = start[2] << 8 | start[3]
        if length < 2 or marker in (0x00, 0xD8, 0xD9):
            raise _OddError(Problem.DAMAGED_HEAD, "JPEG")
        if marker in _JPEG_FRAMES:
            frame = ends.bytes_at(offset + 4, 5)
            if len(frame) < 5:
                raise _OddError(Problem.TRUNCATED_HEAD, "JPEG")
            depth, height, width = unpack_from(">BHH", frame)
            if depth != 8 or marker in _JPEG_NOT_DECODED:
                kind = f"{depth} bits a channel" if depth != 8 else "lossless or hierarchical"
                raise _OddError(Problem.NOT_DECODED, "JPEG", f"{kind}; save it as an 8-bit baseline JPEG or PNG")
        elif marker == 0xE1 and orientation is None:
            segment = ends.bytes_at(offset + 4, length - 2)
            if segment.startswith(b"Exif\0"):
                orientation = _exif_orientation(segment[6:])
        offset += 2 + length
        if marker == 0xDA:
            break
    return _whole("JPEG", width, height, orientation or 1, _jpeg_has_end(ends, offset))


def _jpeg_has_end(ends: _Ends, scan: int) -> bool:
    """EOI behind the start of the first scan. In a scan's data 0xFF is followed by 0 or a restart marker."""
    tail_at = ends.size - len(ends.tail)
    if tail_at + ends.tail.rfind(b"\xff\xd9") >= max(scan, tail_at):
        return True
    # Phones append whole other files behind the picture.
    return scan < ends.size and ends.find(b"\xff\xd9", scan)


def _exif_orientation(tiff: bytes) -> int | None:
    """Orientation of the first directory of a TIFF block, 1 where it has none; None for what is no TIFF block.

    The thumbnail's is in a later directory.
    """
    if tiff[:4] == b"II*\0":
        order = "<"
    elif tiff[:4] == b"MM\0*":
        order = ">"
    else:
        return None
    if len(tiff) < 8:
        return None
    (offset,) = unpack_from(order + "I", tiff, 4)
    if offset + 2 > len(tiff):
        return 1
    (count,) = unpack_from(order + "H", tiff, offset)
    for entry in range(offset + 2, min(offset + 2 + 12 * count, len(tiff) - 11), 12):
        if unpack_from(order + "H", tiff, entry)[0] == 0x0112:
            (value,) = unpack_from(order + "H", tiff, entry + 8)
            return value if 1 <= value <= 8 else 1
    return 1


def _bmp(ends: _Ends) -> ImageHeader:
    head = ends.head
    if len(head) < 26:
        raise _OddError(Problem.TRUNCATED_HEAD, "BMP")
    pixels_at, header_size = unpack_from("<II", head, 10)
    if header_size == 12:
        width, height, planes, bits = unpack_from("<HHHH", head, 18)
        compression = stored = 0
    elif 40 <= header_size <= 124:
        if len(head) < 54:
            raise _OddError(Problem.TRUNCATED_HEAD, "BMP")
        width, height, planes, bits, compression, stored = unpack_from("<iiHHII", head, 18)
    else:
        # Two letters are little evidence: without a header behind them this is some other file.
        raise _OddError(Problem.NOT_AN_IMAGE)
    if planes != 1 or bits not in (1, 4, 8, 16, 24, 32):
        raise _OddError(Problem.DAMAGED_HEAD, "BMP")
    height = abs(height)  # negative: stored from the top down
    if compression in (0, 3, 6):
        stored = (width * bits + 31) // 32 * 4 * height
    return _whole("BMP", width, height, 1, ends.size >= pixels_at + stored)


def _webp(ends: _Ends) -> ImageHeader:
    head = ends.head
    if len(head) < 30:
        raise _OddError(Problem.TRUNCATED_HEAD, "WebP")
    (riff_size,) = unpack_from("<I", head, 4)
    chunk = head[12:16]
    orientation = 1
    if chunk == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in unpack_from("<HH", head, 26))
    elif chunk == b"VP8L" and head[20] == 0x2F:
        (bits,) = unpack_from("<I", head, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif chunk == b"VP8X":
        width = int.from_bytes(head[24:27], "little") + 1
        height = int.from_bytes(head[27:30], "little") + 1
        if head[20] & 0x08:
            orientation = _webp_orientation(ends)
    else:
        raise _OddError(Problem.DAMAGED_HEAD, "WebP")
    return _whole("WebP", width, height, orientation, ends.size >= riff_size + 8)


def _webp_orientation(ends: _Ends) -> int:
    """Orientation of the EXIF chunk, which stands behind the pixels."""
    offset = 12
    while len(start := ends.bytes_at(offset, 8)) == 8:
        chunk, length = unpack_from("<4sI", start)
        if chunk == b"EXIF":
            return _exif_orientation(ends.bytes_at(offset + 8, min(length, 1 << 16))) or 1
        offset += 8 + length + (length & 1)
    return 1
