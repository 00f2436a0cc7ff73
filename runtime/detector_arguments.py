"""What a program gives the `Detector`, checked: a wrong argument is told with what to give instead."""

from __future__ import annotations

import operator
import os
from typing import Any, SupportsIndex

import numpy as np

from parkdet.runtime.errors import UsageError
from parkdet.runtime.geometry import ImageArray
from parkdet.runtime.images import read_image
from parkdet.runtime.nms import NmsSettings

Picture = ImageArray | str | os.PathLike[str]
"""An image: BGR (h, w, 3) uint8 as OpenCV reads it, or the path of a file."""
ImageSize = SupportsIndex | list[SupportsIndex] | tuple[SupportsIndex, ...]
"""A whole number, or a list of one, or of twice the same."""


def nms_settings(*, conf: Any, iou: Any, max_det: Any, multi_label: Any, agnostic: Any) -> NmsSettings:
    """Settings from numbers of any kind, numpy's too. UsageError for what is none, or cannot be."""
    try:
        return NmsSettings(
            conf=_number("conf", conf),
            iou=_number("iou", iou),
            max_det=_whole("max_det is the most detections of an image, a whole number from 1 on", max_det),
            multi_label=switch("multi_label", multi_label),
            agnostic=switch("agnostic", agnostic),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def image_size(imgsz: Any) -> int:
    """Pixels of the long side. UsageError for anything that is no positive whole number."""
    rule = "imgsz is the length of the long side, a whole number from 1 on"
    sides = list(imgsz) if isinstance(imgsz, (list, tuple, np.ndarray)) and np.ndim(imgsz) == 1 else [imgsz]
    if len(sides) == 2 and sides[0] != sides[1]:
        raise UsageError(f"{rule}, not {imgsz!r}: the other side follows from each image")
    if len(sides) not in (1, 2):
        raise UsageError(f"{rule}, not {imgsz!r}")
    size = _whole(rule, sides[0])
    if size < 1:
        raise UsageError(f"{rule}, not {imgsz!r}")
    return size


def switch(name: str, value: Any) -> bool:
    """True or False, or the 1 or 0 for them. UsageError for anything else: the text "no" counts as true in Python."""
    if isinstance(value, (bool, int, np.bool_, np.integer)) and value in (0, 1):
        return bool(value)
    raise UsageError(f"{name} is True or False, not {value!r}")


def pixels_of(image: Any) -> ImageArray:
    """An image's pixels, read if it is a path. UsageError for what is no image, DataError for a file that is none."""
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size:
        return image
    raise UsageError(
        f"an image is BGR (h, w, 3) uint8 with at least one pixel, or the path of a file, not {_described(image)}"
    )


def refuse_one_for_several(images: Any) -> None:
    """UsageError for one image where several are taken."""
    if isinstance(images, (str, bytes, os.PathLike)):
        raise UsageError(f"batch takes several images, not {images!r}: call the detector itself, or .folder")
    if isinstance(images, np.ndarray) and images.ndim < 4:
        raise UsageError(f"batch takes several images, not one of {images.shape}: call the detector itself")


def _number(name: str, value: Any) -> float:
    if isinstance(value, (str, bytes)):
        raise UsageError(f"{name} is a number from 0 to 1, not {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} is a number from 0 to 1, not {value!r}") from error


def _whole(rule: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise UsageError(f"{rule}, not {value!r}")
    try:
        return operator.index(value)
    except TypeError as error:
        raise UsageError(f"{rule}, not {value!r}") from error


def _described(wrong: object) -> str:
    """What was given in an image's place, and how to make an image of it."""
    if isinstance(wrong, np.ndarray):
        return f"{wrong.shape} {wrong.dtype}{_remedy(wrong)}"
    if wrong is None:
        return "None, which is what cv2.imread gives for a file that it cannot read: give the path itself"
    kind = type(wrong).__name__
    if isinstance(wrong, (list, tuple)):
        return f"a {kind}; several images go to .batch"
    if isinstance(wrong, bytes):
        return f"{kind}; of a file's: cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)"
    if hasattr(wrong, "convert") and hasattr(wrong, "getbands"):  # Pillow's
        return f"a {kind}; of one of Pillow's: np.asarray(image.convert('RGB'))[..., ::-1]"
    return f"one of type {kind}"


def _remedy(wrong: np.ndarray[Any, Any]) -> str:
    channels_first = wrong.ndim == 3 and wrong.shape[0] == 3 and wrong.shape[2] != 3
    remedies = (
        (wrong.ndim == 2 or wrong.shape[2:] == (1,), "of a grey one: cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)"),
        (wrong.shape[2:] == (4,), "of one with alpha: cv2.cvtColor(image, cv2.COLOR_BGRA2BGR)"),
        (wrong.ndim == 4, "several images go to .batch"),
        (channels_first, "of one with the channels first: image.transpose(1, 2, 0)"),
        (wrong.dtype == np.uint16, "of one of 16 bits: (image / 257).round().astype(np.uint8)"),
        (wrong.dtype.kind == "f", "of one from 0 to 1: (image * 255).round().astype(np.uint8)"),
    )
    return next((f"; {remedy}" for applies, remedy in remedies if applies), "")
