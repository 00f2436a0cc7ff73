"""The ways to run a run's images, best first: the artifact as asked for, and with a deadline cheaper ones."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from parkdet.runtime.backends.base import Backend, FinishingBackend, GraphBackend, open_backend, resolve_artifact
from parkdet.runtime.backends.onnx_file import read_onnx_metadata
from parkdet.runtime.errors import ArtifactError, UsageError
from parkdet.runtime.model_spec import SPEC_KEY, ModelSpec
from parkdet.runtime.pipeline import Plan
from parkdet.runtime.views import TTA_VIEWS

SMALLER_CANVASES = (0.75, 0.5)
"""Shares of the long side at which the cheapest artifact runs when nothing else is in time."""
_VIEW_WORDS = ("one scale", "two scales", "three scales")


def open_plans(
    stack: ExitStack, path: Path, imgsz: int | None, *, cheaper: bool, fallbacks: Sequence[Path] = (), **how: Any
) -> tuple[Plan, ...]:
    """The plan that was asked for; with `cheaper` also those to step down to, each cheaper than the one before.

    `how`: arguments of `open_backend`. `fallbacks` are further artifacts, best first; without them the ONNX file
    beside `path` is taken that is of the same checkpoint and makes no test-time views. The backends are closed
    with the stack. UsageError where artifacts are not of the same classes.
    """
    best = stack.enter_context(open_backend(path, **how))
    size = imgsz or best.spec.imgsz
    plans = [_plan(best, size)]
    if not cheaper:
        return tuple(plans)
    opened = [best]
    if best.spec.tta and not isinstance(best, FinishingBackend):
        two = stack.enter_context(open_backend(path, views=2, **how))
        plans.append(_plan(two, size, views=2))
    others = [resolve_artifact(other) for other in fallbacks] or _beside(path, best.spec)
    for other in others:
        backend = stack.enter_context(open_backend(other, **how))
        _check_same_classes(best, backend)
        opened.append(backend)
        plans.append(_plan(backend, size, file=other.name))
    if best.spec.tta and not others and not isinstance(best, FinishingBackend):
        one = stack.enter_context(open_backend(path, views=1, **how))
        opened.append(one)
        plans.append(_plan(one, size, views=1))
    last = plans[-1]
    if _any_canvas(last.backend):
        for share in SMALLER_CANVASES:
            smaller = max(round(size * share), 2 * best.spec.stride_max)
            if smaller < plans[-1].imgsz:
                name = last.name.replace(f"{last.imgsz} px", f"{smaller} px")
                plans.append(replace(last, name=name, imgsz=smaller, cost=last.cost * (smaller / size) ** 2))
    return tuple(plans)


def _plan(backend: Backend, imgsz: int, views: int | None = None, file: str = "") -> Plan:
    """A backend at a size; the cost is the views' area, one of a canvas of this size being 1."""
    count = (views or len(TTA_VIEWS)) if backend.spec.tta else 1
    words = _VIEW_WORDS[count - 1]
    if backend.spec.tta and count == 1:
        words += " without the coarsest level"  # which the first of three views leaves to the others
    name = f"{words} at {imgsz} px" + (f" by {file}" if file else "")
    return Plan(name, backend, imgsz, sum(view.scale**2 for view in TTA_VIEWS[:count]))


def _beside(path: Path, spec: ModelSpec) -> list[Path]:
    """The ONNX file of the same checkpoint without test-time views in the artifact's folder, if there is one."""
    if not spec.tta or not spec.checkpoint_sha256 or path.suffix.lower() != ".onnx":
        return []
    for other in sorted(path.parent.glob("*.onnx")):
        try:
            found = ModelSpec.from_json(read_onnx_metadata(other).get(SPEC_KEY, ""), str(other))
        except (ArtifactError, OSError):
            continue  # not one of ours, or damaged: nobody asked for this one
        fits = found.head == "raw" and found.input_format == "uint8-nhwc" and found.precision == spec.precision
        if fits and not found.tta and found.checkpoint_sha256 == spec.checkpoint_sha256:
            return [other]
    return []


def _check_same_classes(best: GraphBackend, other: GraphBackend) -> None:
    if (best.spec.class_names, best.spec.category_ids) != (other.spec.class_names, other.spec.category_ids):
        raise UsageError(f"{other.path}: knows other classes than {best.path}; their detections cannot be one run")


def _any_canvas(backend: Backend) -> bool:
    choices = backend.canvases if isinstance(backend, FinishingBackend) else ()
    return backend.fixed_input[1:] == (None, None) and not choices
