"""Memory of the TensorRT backend: what all runs share in turn, and what each run in flight has for itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from contextlib import ExitStack

import numpy as np

from parkdet.runtime.cuda.driver import DeviceBuffer, Event, Graph, Owned, PinnedBuffer
from parkdet.runtime.geometry import ImageArray

ALIGNMENT = 256
"""Of every tensor and image in device memory, in bytes."""
_KEPT_GRAPHS = 4


def aligned(size: int) -> int:
    """Bytes up to the next place where something may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Growing(Owned):
    """A buffer that is replaced by a larger one when need be; its content is not kept."""

    def __init__(self, kind: type[DeviceBuffer] | type[PinnedBuffer]) -> None:
        self._kind = kind
        self._buffer: DeviceBuffer | PinnedBuffer | None = None
        self._open = True

    def reserve(self, size: int) -> bool:
        """Have at least `size` bytes; True when the address is another one than before.

        The old buffer goes first, so that both need not fit: nothing may be in progress that uses it.
        OutOfDeviceMemory leaves none.
        """
        if self._buffer is not None and self._buffer.bytes >= size:
            return False
        self._release()
        self._buffer = self._kind(max(aligned(size), ALIGNMENT))
        return True

    @property
    def pointer(self) -> int:
        assert self._buffer is not None, "reserve comes first"
        return self._buffer.pointer

    @property
    def bytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.bytes

    @property
    def pinned(self) -> PinnedBuffer:
        assert isinstance(self._buffer, PinnedBuffer)
        return self._buffer

    def drop(self) -> None:
        """Give the memory back; `reserve` takes some again."""
        self._release()

    def _release(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            buffer.close()


class SharedMemory(Owned):
    """What the compute stream uses for one run after the other, so that once is enough for all runs and engines."""

    def __init__(self) -> None:
        self.canvases = Growing(DeviceBuffer)
        self.heads = Growing(DeviceBuffer)
        self.scratch = Growing(DeviceBuffer)
        """TensorRT's activations."""
        self.workspace = Growing(DeviceBuffer)
        """Of the post-processing."""
        self.epoch = 0
        """Counts the times that an address changed: what was recorded before must not be replayed."""
        self._open = True

    def reserve(self, canvases: int, heads: int, scratch: int, workspace: int) -> None:
        """Have at least so many bytes of each."""
        sizes = (canvases, heads, scratch, workspace)
        # One after the other without a short cut, and counted even if one of them fails.
        for buffer, size in zip(self._buffers(), sizes, strict=True):
            if buffer.bytes < size or not buffer.bytes:
                self.epoch += 1
                buffer.reserve(size)

    def drop(self) -> None:
        """Give everything back."""
        self.epoch += 1
        with ExitStack() as stack:
            for buffer in self._buffers():
                stack.callback(buffer.drop)

    def _buffers(self) -> tuple[Growing, ...]:
        return (self.canvases, self.heads, self.scratch, self.workspace)

    def _release(self) -> None:
        self.drop()


class Slot(Owned):
    """One place of the ring: a batch's images on their way in, its detections on their way out.

    Only the thread that took the slot touches its pinned memory, and only while no work of the device does: after
    `done` was waited for.
    """

    def __init__(self) -> None:
        self.uploaded = Event()
        try:
            self.done = Event()
        except BaseException:
            self.uploaded.close()
            raise
        self.pinned_images = Growing(PinnedBuffer)
        self.images = Growing(DeviceBuffer)
        self.results = Growing(DeviceBuffer)
        self.pinned_results = Growing(PinnedBuffer)
        self._graphs: OrderedDict[Hashable, Graph | None] = OrderedDict()
        self._open = True

    def fill(self, images: Sequence[ImageArray]) -> tuple[list[int], int]:
        """Copy images (h, w, 3) uint8 into pinned memory, one after the other: their offsets and the bytes in all."""
        offsets, total = [], 0
        for image in images:
            offsets.append(total)
            total += aligned(image.nbytes)
        self.pinned_images.reserve(total)
        self.images.reserve(total)
        for image, offset in zip(images, offsets, strict=True):
            np.copyto(self.pinned_images.pinned.view(np.uint8, image.shape, offset), image)
        return offsets, total

    def graph(self, key: Hashable) -> tuple[bool, Graph | None]:
        """Whether work of this key was run before in this slot, and the graph recorded of it."""
        if key not in self._graphs:
            return False, None
        self._graphs.move_to_end(key)
        return True, self._graphs[key]

    def keep_graph(self, key: Hashable, graph: Graph | None) -> None:
        """Remember the key, and its graph once there is one; the least used go."""
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        while len(self._graphs) > _KEPT_GRAPHS:
            _, old = self._graphs.popitem(last=False)
            if old is not None:
                old.close()

    def drop(self) -> None:
        """Give back everything but the events; nothing of the slot may be in progress."""
        graphs, self._graphs = self._graphs, OrderedDict()
        with ExitStack() as stack:
            for buffer in (self.pinned_images, self.images, self.results, self.pinned_results):
                stack.callback(buffer.drop)
            for graph in graphs.values():
                if graph is not None:
                    stack.enter_context(graph)

    def _release(self) -> None:
        with self.uploaded, self.done:
            self.drop()
