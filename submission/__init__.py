"""Predictions to the contest's JSON, under the limit. The names below are loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parkdet.submission.check import check_submission as check_submission
    from parkdet.submission.cut import Fit as Fit
    from parkdet.submission.cut import fit as fit
    from parkdet.submission.cut import fit_distinct as fit_distinct
    from parkdet.submission.lines import SubmissionFormat as SubmissionFormat
    from parkdet.submission.write import write_submission as write_submission

_HOME = {
    "Fit": "cut",
    "SubmissionFormat": "lines",
    "check_submission": "check",
    "fit": "cut",
    "fit_distinct": "cut",
    "write_submission": "write",
}

__all__ = [  # noqa: PLE0604 - the names of the table above
    *_HOME
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
