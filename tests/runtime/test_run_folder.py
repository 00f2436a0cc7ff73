"""One process a run folder; the lock ends with its holder, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from parkdet.runtime.errors import InUseError
from parkdet.runtime.run_folder import sole_writer

HOLD = """
import os, sys, time
from pathlib import Path
from parkdet.runtime.run_folder import sole_writer
with sole_writer(Path(sys.argv[1])):
    if os.fork() == 0:  # as a loader's worker
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InUseError, match=str(tmp_path)), sole_writer(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with sole_writer(tmp_path):  # although the forked child still runs
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_the_lock_can_be_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        with sole_writer(tmp_path):
            pass
