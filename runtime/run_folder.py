"""Run folders: `exp`, `exp2`, `exp3`, ... as YOLOv5 numbers them; no run writes into another's by chance."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from parkdet.runtime.errors import UsageError


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
        raise UsageError(
            f"{error.filename or project}: the run folder cannot be made ({error.strerror}); "
            "name a writable one with --project"
        ) from None
    raise AssertionError("count() does not end")
