"""Signals that must wait until worker processes have started."""

from __future__ import annotations

import subprocess
import sys

_PROBE = """
import os, signal, sys, threading, time
from parkdet.runtime.terminal import interrupts_held_back
# A library's thread, open to signals: the system may give it what the blocked main thread does not take.
threading.Thread(target=lambda: time.sleep(60), daemon=True).start()
try:
    with interrupts_held_back():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        print("undisturbed", flush=True)
except KeyboardInterrupt:
    print("then interrupted")
"""


def test_an_interrupt_waits_for_the_end_whatever_thread_takes_it() -> None:
    probe = subprocess.run([sys.executable, "-P", "-c", _PROBE], capture_output=True, text=True, check=False)
    assert probe.stdout.split("\n")[:2] == ["undisturbed", "then interrupted"], probe.stderr
