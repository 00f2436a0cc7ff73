"""Image files to pixels: checked by their headers first, then decoded as OpenCV decodes them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from parkdet.runtime.errors import DataError, UsageError
from parkdet.runtime.geometry import ImageArray
from parkdet.runtime.image_headers import ImageHeader, read_header
from parkdet.runtime.image_names import IMAGE_EXTENSIONS, OTHER_IMAGE_EXTENSIONS

MAX_PIXELS = 500_000_000
"""Width times height above which an image is refused before it is decoded: 1.5 GB as BGR."""


def read_image(
    path: str | os.PathLike[str],
    max_pixels: int = MAX_PIXELS,
    least_hw: tuple[int, int] | None = None,
    header: ImageHeader | None = None,
) -> ImageArray:
    """Decode one file to BGR (h, w, 3) uint8 as `cv2.imread(path, cv2.IMREAD_COLOR)` does.

    With `least_hw` a JPEG is decoded at 1/2, 1/4 or 1/8 of its sides, rounded up, the smallest at which neither falls
    below these: the decoder then averages its pixels for less than they would cost. `header`: the file's, where it
    has been read already.

    The EXIF orientation is applied; grey, palette and CMYK images become BGR, alpha is dropped, 16 bits a
    channel become 8. DataError names the file and the reason: missing, zero bytes, not an image, cut off,
    more than `max_pixels` (read from the header, before anything is decoded), damaged, changed meanwhile.
    """
    import cv2

    header = header or read_header(path)
    if header.problem is not None:
        raise DataError(f"{os.fspath(path)}: {header.problem}")
    if header.width * header.height > max_pixels:
        raise DataError(
            f"{os.fspath(path)}: {header.width} x {header.height} is {header.width * header.height:,} pixels, "
            f"more than the limit of {max_pixels:,}"
        )
    try:
        # Not cv2.imread: it decodes file names by the system's code page on some platforms.
        encoded = np.fromfile(path, np.uint8, header.file_bytes + 1)
    except (OSError, MemoryError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise DataError(f"{os.fspath(path)}: cannot be read ({reason})") from error
    if len(encoded) != header.file_bytes:
        raise DataError(f"{os.fspath(path)}: was changed while it was read; run again when it is whole")
    mode = cv2.IMREAD_COLOR
    if least_hw is not None and header.format == "JPEG":
        mode = {
            1: cv2.IMREAD_COLOR,
            2: cv2.IMREAD_REDUCED_COLOR_2,
            4: cv2.IMREAD_REDUCED_COLOR_4,
            8: cv2.IMREAD_REDUCED_COLOR_8,
        }[reduction((header.height, header.width), least_hw)]
    try:
        image = cv2.imdecode(encoded, mode)
    except (cv2.error, MemoryError) as error:
        reason = "out of memory" if isinstance(error, MemoryError) else error.err or error.func
        raise DataError(f"{os.fspath(path)}: cannot be decoded ({reason})") from error
    if image is None:
        raise DataError(
            f"{os.fspath(path)}: is damaged, its {header.format} data cannot be decoded; get the file again"
        )
    return np.asarray(image, np.uint8)


def reduction(image_hw: tuple[int, int], least_hw: tuple[int, int]) -> int:
    """8, 4, 2 or 1: the largest part of an image's sides, rounded up, at which neither falls below `least_hw`."""
    for part in (8, 4, 2):
        if all(-(-side // part) >= least for side, least in zip(image_hw, least_hw, strict=True)):
            return part
    return 1


def list_images(source: str | os.PathLike[str]) -> list[Path]:
    """The images directly in a folder, by suffix, sorted by name; or the one file that `source` names.

    Those of formats that parkdet does not read are among them, so that none is lost without a word. Hidden files are
    none: macOS puts a `._a.jpg` beside a.jpg on foreign disks.
    UsageError when the path does not exist or the folder holds no image.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such file or folder")
    images = sorted(
        (
            entry
            for entry in path.iterdir()
            if entry.suffix.lower() in IMAGE_EXTENSIONS | OTHER_IMAGE_EXTENSIONS
            and not entry.name.startswith(".")
            and not entry.is_dir()
        ),
        key=lambda entry: entry.name,
    )
    if not images:
        raise UsageError(
            f"{path}: holds no images, files ending in {', '.join(sorted(IMAGE_EXTENSIONS))} (not in subfolders)"
        )
    return images
