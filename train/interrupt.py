"""Ctrl-C in a training: the batch in progress is finished, then the state is saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

SAME_PRESS_SECONDS = 1.0
"""A terminal signals the whole group, and torchrun passes on what it gets: two signals so close are one."""


class StopSwitch:
    """While it is open, the first SIGINT or SIGTERM asks to stop; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._asked_at > SAME_PRESS_SECONDS:
            raise KeyboardInterrupt
        if self.asked:
            return
        self.asked, self._asked_at = True, now
        # Not through sys.stderr: the signal may have come while the same thread was writing there.
        with suppress(OSError):
            os.write(2, b"\nstopping after this batch; again to stop at once\n")
