"""Writes a submission so that the file is either the old one or a whole, checked new one."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from parkdet.runtime.errors import GateError, ParkdetError, UsageError
from parkdet.submission.cut import Fit
from parkdet.submission.findings import CheckReport


def write_submission(fit: Fit, path: Path, check: Callable[[Path], CheckReport]) -> CheckReport:
    """Writes the fitted detections to `path`, checked before they take its name.

    `check` reads what is on the disk, under a temporary name in the same folder. Raises GateError with
    its findings where a judge would refuse the file; whatever fails, an older file at `path` stays as it
    was and nothing is left beside it.
    """
    require_writable(path)
    # A link keeps pointing at the file that it names.
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        _remove_abandoned(target)
        with temporary.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # it is being written: see _remove_abandoned
            _write_synced(fit, file)
            report = _checked(fit, path, temporary, check)
            temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        # A write knows no file name and an open only the temporary one; the message needs the user's.
        if error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return report


def _checked(fit: Fit, path: Path, temporary: Path, check: Callable[[Path], CheckReport]) -> CheckReport:
    """What a judge says of the file that is to become `path`, if it may."""
    size = temporary.stat().st_size
    if size != fit.size_bytes or size >= fit.limit_bytes:
        raise ParkdetError(
            f"{path}: {size:,} bytes were written where {fit.size_bytes:,} were computed, "
            f"limit {fit.limit_bytes:,}; the file was not kept, please report this"
        )
    report = check(temporary)
    if report.findings:
        raise GateError(
            f"{path}: not written, for a judge would refuse it:\n{report}\n"
            "the predictions are of another data set or damaged; run 'parkdet infer' on this one"
        )
    if report.entry_count != fit.kept_count:
        raise ParkdetError(
            f"{path}: holds {report.entry_count:,} detections instead of {fit.kept_count:,}; "
            "the file was not kept, please report this"
        )
    return report


def _remove_abandoned(target: Path) -> None:
    """Delete what writers of this file that were killed left behind; one that lives holds a lock on its own."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def require_writable(path: Path) -> None:
    """Raises UsageError where a file of this name cannot be."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: is not a regular file; name the file to write with --output")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"{path.resolve().parent}: no such folder; make it, or name another with --output")


def _write_synced(fit: Fit, file: BinaryIO) -> None:
    for chunk in fit.format.file_chunks(fit.kept):
        file.write(chunk)
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes the new name last through a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
