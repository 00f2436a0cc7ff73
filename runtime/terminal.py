"""A long command's way with its terminal: progress, signals, and other libraries' messages."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PLAIN_PROGRESS_SECONDS = 5.0
"""Time between two lines of progress where there is no terminal."""


@contextmanager
def stop_signals(
    message: str = "Stopping: finishing and saving what is in progress ...", insisting: bool = True
) -> Iterator[threading.Event]:
    """An event that Ctrl-C or a termination signal sets; a second Ctrl-C stops at once if `insisting` helps.

    It does not where native code calls back into Python: an exception of a callback is lost, or ends the process.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _frame: object) -> None:
        if insisting and stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not stop.is_set():
            # Not through sys.stderr: the signal may have come while the same thread was writing there.
            with suppress(OSError):
                os.write(2, f"\n{message}\n".encode())
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupts_held_back(*numbers: signal.Signals) -> Iterator[None]:
    """Start worker processes inside: they inherit that these signals wait, and one that comes now waits for the end.

    SIGINT when none is named. Ctrl-C reaches every process of the terminal: a worker that met it while it still
    imports, before it can ignore it, would print a traceback.
    """
    blocked = numbers or (signal.SIGINT,)
    held: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        # The mask is this thread's: one of a library may take the signal, and Python's handler then runs here.
        answered = [number for number in blocked if callable(signal.getsignal(number))]
        handlers = {number: signal.signal(number, lambda one, _frame: held.append(one)) for number in answered}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in held:
            signal.raise_signal(late)


@contextmanager
def progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, else one plain line every few seconds; both on stderr."""
    started = time.perf_counter()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        with Progress(
            TextColumn("images"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.1f}/s"),
            TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        ) as bar:  # fmt: skip
            task = bar.add_task("images", total=None, rate=0.0)
            yield lambda done, total: bar.update(
                task, completed=done, total=total, rate=done / (time.perf_counter() - started)
            )
        return
    last = started

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last < PLAIN_PROGRESS_SECONDS:
            return
        last = now
        rate = done / (now - started)
        print(
            f"{done} of {total} images, {rate:.1f}/s, {(total - done) / rate:.0f} s to go", file=sys.stderr, flush=True
        )

    yield tell


_DECODER_LINES = (
    b"libpng warning:",
    b"libpng error:",
    b"Corrupt JPEG data:",
    b"Premature end of JPEG file",
    b"Invalid SOS parameters",
    b"Unsupported marker type",
    b"[ WARN:",
    b"[ERROR:",
)
"""Beginnings of what libpng, libjpeg and OpenCV write to file descriptor 2 about single images."""


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Keep what the image libraries print about single files off the terminal while the block runs.

    They write to file descriptor 2 from C, naming no file; `read_image` reports with the file's name what they
    could not decode. All other lines pass. Python's `sys.stderr` goes on writing to the terminal directly.
    For a program's outermost level: the descriptor belongs to the whole process.
    """
    try:
        terminal = os.dup(2)
    except OSError:  # no stderr at all
        yield
        return
    python_stderr = sys.stderr
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    relay = threading.Thread(target=_relay, args=(reading, terminal), name="stderr relay", daemon=True)
    relay.start()
    direct = None
    if _writes_to(python_stderr, 2):
        python_stderr.flush()
        direct = os.fdopen(
            os.dup(terminal), "w", encoding=python_stderr.encoding, errors="backslashreplace", buffering=1
        )
        sys.stderr = direct
    try:
        yield
    finally:
        if direct is not None:
            sys.stderr = python_stderr
            direct.close()
        os.dup2(terminal, 2)  # closes the pipe's last writing end, which ends the relay
        relay.join(timeout=5)
        os.close(terminal)


def _writes_to(stream: object, descriptor: int) -> bool:
    try:
        return bool(stream.fileno() == descriptor)  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False


def _relay(reading: int, terminal: int) -> None:
    """Copy whole lines from one descriptor to the other, but for the decoders' own."""
    rest = b""
    while block := os.read(reading, 65536):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line and not line.startswith(_DECODER_LINES):
                os.write(terminal, line + b"\n")
    if rest and not rest.startswith(_DECODER_LINES):
        os.write(terminal, rest)
    os.close(reading)
