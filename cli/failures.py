"""What the user is told when a command fails, and the exit code that goes with it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import click

from parkdet.runtime.errors import EXIT_FAILED, EXIT_INTERRUPTED, Interrupted, ParkdetError

EXTRA_OF_MODULE = {
    "torch": "train",
    "onnx": "train",
    "onnxscript": "train",
    "tensorboard": "train",
    "matplotlib": "train",
    "openvino": "cpu",
    "onnxruntime": "cpu",
    "jinja2": "report",
    "plotly": "report",
}
"""Top-level modules that `pip install parkdet` alone does not bring, and the extra that does."""

_OS_REMEDIES = {
    errno.EACCES: "check the owner and mode of it and of the folders above, or name another place",
    errno.EPERM: "check the owner and mode of it and of the folders above, or name another place",
    errno.EROFS: "name a folder that can be written",
    errno.EISDIR: "a file is expected here, and this is a folder",
    errno.ENOTDIR: "a folder is expected here, and this is a file",
    errno.ENOENT: "it was removed, or the name is mistyped",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or lower --workers",
    errno.EIO: "the disk or the network share reports a fault",
}


def explain(error: BaseException) -> tuple[str, int]:
    """The message for stderr (one or more lines, no traceback) and the exit code."""
    match error:
        case Interrupted():
            return f"interrupted: {error}" if str(error) else "interrupted", error.exit_code
        case KeyboardInterrupt() | click.Abort():
            return "interrupted", EXIT_INTERRUPTED
        case ParkdetError():
            return f"error: {error}", error.exit_code
        case click.UsageError():
            command = error.ctx.command_path if error.ctx is not None else "parkdet"
            return f"error: {error.format_message()}\nsee '{command} --help'", error.exit_code
        case click.ClickException():
            return f"error: {error.format_message()}", error.exit_code
        case _:
            return f"error: {_foreign(error)}", EXIT_FAILED


def _foreign(error: BaseException) -> str:
    """The message for an exception that comes from Python, the system or a library."""
    full = next((cause for cause in _causes(error) if _is_full(cause)), None)
    if full is not None:
        return _disk_full(full)
    if isinstance(error, ImportError) and (missing := _missing_library(error)) is not None:
        return missing
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        remedy = _OS_REMEDIES.get(error.errno)
        reason = error.strerror or os.strerror(error.errno)
        return f"{_place(error)}: {reason}{f' ({remedy})' if remedy else ''}"
    detail = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch has its own
        return f"out of memory{f' ({detail})' if detail else ''}; lower --batch-size, --workers or --imgsz"
    return (
        f"unexpected {type(error).__name__}{f': {detail}' if detail else ''}\n"
        "run again with --debug for the traceback; please report it"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _disk_full(error: BaseException) -> str:
    assert isinstance(error, OSError)
    what = "the disk quota is used up" if error.errno == errno.EDQUOT else "the disk is full"
    where = f"{_place(error)}: " if error.filename is not None else ""
    return f"{where}{what}; free some space or name a folder on another disk, and run the same command again"


def _place(error: OSError) -> str:
    target = error.filename2 if error.filename2 is not None else error.filename
    return os.fsdecode(target) if isinstance(target, bytes) else str(target)


def _missing_library(error: ImportError) -> str | None:
    """The sentence for a library of an extra that is absent or does not load; None for any other module."""
    module = (error.name or "").partition(".")[0]
    extra = EXTRA_OF_MODULE.get(module)
    if extra is None:
        return None
    command = f"pip install 'parkdet[{extra}]'"
    if isinstance(error, ModuleNotFoundError) and error.name == module:
        return f"this command needs {module}, which is not installed; run: {command}"
    detail = " ".join(str(error).split())
    return f"{module} is installed but does not load ({detail}); run: pip install --force-reinstall {module}"
