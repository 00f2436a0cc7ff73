"""parkdet in a program that keeps its images on the GPU with pycuda.

    python examples/pycuda_images.py best.engine lot.jpg ...

pycuda's memory and stream are handed over as integers; CuPy's (`array.data.ptr`, `stream.ptr`) and torch's
(`tensor.data_ptr()`, `stream.cuda_stream`) go the same way. What matters is that all share the device's primary
context.
"""

from __future__ import annotations

import sys

import pycuda.driver as cuda

from parkdet.runtime.backends import open_backend
from parkdet.runtime.backends.tensorrt import DeviceImage, TensorRtBackend
from parkdet.runtime.canvas_choice import fit_letterbox
from parkdet.runtime.images import read_image
from parkdet.runtime.nms import NmsSettings


def main(engine: str, paths: list[str]) -> None:
    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    context.push()
    try:
        stream = cuda.Stream()
        with open_backend(engine) as backend:
            assert isinstance(backend, TensorRtBackend)
            for path in paths:
                image = read_image(path)
                staged = cuda.pagelocked_empty(image.shape, image.dtype)
                staged[:] = image
                on_device = cuda.mem_alloc(image.nbytes)
                cuda.memcpy_htod_async(on_device, staged, stream)
                # ... here a program would do its own work on the stream ...
                letterbox = fit_letterbox((image.shape[0], image.shape[1]), backend.spec.imgsz, backend)
                settings = NmsSettings(conf=0.25, iou=0.45, max_det=300, multi_label=False)
                ((found, _),) = backend.detect_on_device(
                    [DeviceImage(int(on_device))], [letterbox], settings, stream.handle
                )
                print(f"{path}: {len(found)} detections")
                for box, score, class_id in zip(
                    letterbox.to_image(found.xyxy), found.scores, found.class_ids, strict=True
                ):
                    print(f"  {backend.spec.class_names[class_id]} {score:.2f}", *(f"{side:.0f}" for side in box))
                on_device.free()
    finally:
        context.pop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
