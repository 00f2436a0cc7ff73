"""The detector as a program uses it: an artifact in, detections in image pixels out."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from parkdet.runtime.backends.base import FinishingBackend, Precision, open_backend, refuse_unfit_views
from parkdet.runtime.canvas_choice import fit_letterbox
from parkdet.runtime.detections import Detections
from parkdet.runtime.detector_arguments import (
    ImageSize,
    Picture,
    image_size,
    nms_settings,
    pixels_of,
    refuse_one_for_several,
    switch,
)
from parkdet.runtime.errors import DataError, UsageError
from parkdet.runtime.geometry import ImageArray, Letterbox
from parkdet.runtime.images import list_images, read_image
from parkdet.runtime.loading import ahead
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.post_processing import finish, post_process

_READERS = 2
"""Threads that read a folder's images while the model, which has all processors, works on the one before."""


class Detector:
    """An exported model, ready for pictures.

        detector = Detector("best.onnx")
        for box, score, class_id in detector("street.jpg"):
            print(detector.spec.class_names[class_id], score, box)

    The defaults are those for looking at pictures; the contest's are conf=0.01, iou=0.7, max_det=50,
    multi_label=True. May be called from several threads. `with` or `close` gives the memory back.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        conf: float = 0.25,
        iou: float = 0.45,
        max_det: int = 300,
        multi_label: bool = False,
        agnostic: bool = False,
        tta: bool = False,
        device: str | int | None = None,
        backend: str | None = None,
        precision: Precision | None = None,
        imgsz: ImageSize | None = None,
    ) -> None:
        """Open `path`: an .onnx file, or an OpenVINO .xml file or its folder.

        `imgsz` is the length to which an image's long side is scaled, by default the one the model was made
        for; `precision` is what it computes in, by default bf16 where the processor has it. UsageError for a
        setting, device or path that cannot be, or for test-time augmentation that the artifact was exported
        without; ArtifactError for a damaged artifact.
        """
        self.nms = nms_settings(conf=conf, iou=iou, max_det=max_det, multi_label=multi_label, agnostic=agnostic)
        size = None if imgsz is None else image_size(imgsz)
        views = switch("tta", tta)
        self._backend = open_backend(
            path, backend, None if device is None else str(device), goal="latency", precision=precision
        )
        try:
            refuse_unfit_views(self._backend.spec, views, path)
        except UsageError:
            self._backend.close()
            raise
        self.imgsz = size or self._backend.spec.imgsz

    @property
    def spec(self) -> ModelSpec:
        """What the model is: class names, category ids, strides, image size."""
        return self._backend.spec

    def __call__(self, image: Picture) -> Detections:
        """Detections of one image, in its pixels. DataError when a file cannot be read."""
        return self.batch([image])[0]

    def batch(self, images: Iterable[Picture]) -> list[Detections]:
        """Detections of several images, each in its own pixels.

        Images of one canvas size run together, as many at once as the backend gains by.
        """
        refuse_one_for_several(images)
        pictures = [pixels_of(image) for image in images]
        letterboxes = [fit_letterbox((image.shape[0], image.shape[1]), self.imgsz, self._backend) for image in pictures]
        groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for index, letterbox in enumerate(letterboxes):
            groups[letterbox.canvas_hw].append(index)
        found: dict[int, Detections] = {}
        together = self._backend.fixed_input[0] or self._backend.worth_batching
        for group in groups.values():
            for start in range(0, len(group), together):
                indices = group[start : start + together]
                found.update(zip(indices, self._infer(indices, pictures, letterboxes), strict=True))
        return [found[index] for index in range(len(pictures))]

    def folder(
        self, folder: str | os.PathLike[str], on_error: Callable[[Path, DataError], object] | None = None
    ) -> Iterator[tuple[Path, Detections]]:
        """The images directly in a folder, sorted by name, each with its detections; the next are read meanwhile.

        UsageError at once when there are none. An image that cannot be read ends the iteration with its DataError;
        with `on_error` the path and the error go there instead, and the iteration goes on.
        """
        paths = list_images(folder)
        return self._each(paths, on_error)

    def _each(
        self, paths: Sequence[Path], on_error: Callable[[Path, DataError], object] | None
    ) -> Iterator[tuple[Path, Detections]]:
        with ThreadPoolExecutor(_READERS, "reader") as readers:
            for path, image in ahead(readers, _read, iter(paths), _READERS + 1):
                if not isinstance(image, DataError):
                    yield path, self(image)
                elif on_error is None:
                    raise image
                else:
                    on_error(path, image)

    def close(self) -> None:
        """Give the model's memory back."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _infer(self, indices: list[int], pictures: list[ImageArray], letterboxes: list[Letterbox]) -> list[Detections]:
        backend = self._backend
        onto = [letterboxes[index] for index in indices]
        if isinstance(backend, FinishingBackend):
            on_canvas = backend.detect([pictures[index] for index in indices], onto, self.nms)
            done = [finish(*one, letterbox) for one, letterbox in zip(on_canvas, onto, strict=True)]
        else:
            canvases = np.stack([self._canvas(pictures[index], letterboxes[index]) for index in indices])
            done = post_process(backend.infer(canvases), self.spec, self.nms, onto)
        return [image.detections for image in done]

    def _canvas(self, image: ImageArray, letterbox: Letterbox) -> ImageArray:
        import cv2

        try:
            return letterbox.apply(image)
        except (cv2.error, MemoryError) as error:
            (height, width), (canvas_height, canvas_width) = letterbox.image_hw, letterbox.canvas_hw
            raise DataError(
                f"an image of {height} x {width} cannot be scaled onto its canvas of {canvas_height} x {canvas_width} "
                f"({str(error).strip() or 'out of memory'}); imgsz is {self.imgsz}"
            ) from error


def _read(path: Path) -> tuple[Path, ImageArray | DataError]:
    """An image of a folder, or why it cannot be read."""
    try:
        return path, read_image(path)
    except DataError as error:
        return path, error
