"""The kernels on a device: loaded once, launched from the records that `kernels.py` makes."""

from __future__ import annotations

from collections.abc import Iterable

from parkdet.runtime.cuda.driver import Function, Module, Owned, Stream
from parkdet.runtime.cuda.fatbin import read_fatbin
from parkdet.runtime.cuda.kernels import Launch


class DeviceKernels(Owned):
    """The shipped kernels, loaded on the current device.

    `run` takes any stream, ours or `Stream(handle)` of pycuda, CuPy or torch, and launch records whose addresses are
    anybody's device pointers.
    """

    def __init__(self, image: bytes | None = None) -> None:
        """`image`: by default the fatbin of this installation. DriverError where it holds nothing for the device."""
        self._module = Module(read_fatbin() if image is None else image)
        self._functions: dict[str, Function] = {}
        self._open = True

    def run(self, launches: Iterable[Launch], stream: Stream) -> None:
        """Ask the stream for these launches, in their order."""
        for launch in launches:
            function = self._functions.get(launch.entry)
            if function is None:
                function = self._functions[launch.entry] = self._module.function(launch.entry)
            function.launch(launch.grid, launch.block[0], launch.parameters, stream)

    def _release(self) -> None:
        self._module.close()
