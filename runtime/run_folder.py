"""Run folders: `exp`, `exp2`, `exp3`, ... as YOLOv5 numbers them; no run writes into another's by chance."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from parkdet.runtime.errors import InUseError, UsageError


def next_run_folder(project: Path, name: str, exist_ok: bool) -> Path:
    """Create and return the first free of `project/name`, `project/name2`, `project/name3`, ...

    With `exist_ok` it is `project/name`, there or not. Two programs that ask at the same moment get two
    folders: the one whose mkdir succeeds owns it. Raises UsageError where the folder cannot be made.
    """
    if not name or name in (".", "..") or Path(name).name != name:
        raise UsageError(f"--name {name!r} must be the name of one folder; say where it belongs with --project")
    try:
        project.mkdir(parents=True, exist_ok=True)
        if exist_ok:
            (project / name).mkdir(exist_ok=True)
            return project / name
        for number in count(1):
            folder = project / (name if number == 1 else f"{name}{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # a full disk is no mistake of the command line
        raise UsageError(
            f"{error.filename or project}: the run folder cannot be made ({error.strerror}); "
            "name a writable one with --project"
        ) from None
    raise AssertionError("count() does not end")


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process alone. InUseError where another one does.

    A POSIX record lock: it ends with this process even by SIGKILL, and loader processes that it forked do not
    inherit it.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InUseError(
                f"{folder}: another process is writing here; wait for it, or choose another --name"
            ) from None
        yield
    finally:
        os.close(descriptor)
