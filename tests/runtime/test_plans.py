"""Plans to step down to: by views, by another artifact, by smaller canvases, each cheaper than the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from parkdet.runtime.errors import UsageError
from parkdet.runtime.plans import _beside, open_plans

Random = Callable[..., Any]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def test_without_a_deadline_there_is_the_one_that_was_asked_for(stack: ExitStack, tiny_onnx: Path) -> None:
    (plan,) = open_plans(stack, tiny_onnx, None, cheaper=False)
    assert (plan.imgsz, plan.backend.path) == (96, tiny_onnx)
    assert open_plans(stack, tiny_onnx, 128, cheaper=False)[0].imgsz == 128


def test_smaller_canvases_cost_their_area(stack: ExitStack, tiny_onnx: Path) -> None:
    plans = open_plans(stack, tiny_onnx, None, cheaper=True)
    assert [(plan.name, plan.imgsz) for plan in plans] == [
        ("one scale at 96 px", 96), ("one scale at 72 px", 72), ("one scale at 48 px", 48),
    ]  # fmt: skip
    assert [plan.cost for plan in plans] == [1, 0.75**2, 0.25]
    assert len({plan.backend for plan in plans}) == 1


def test_a_graph_of_fixed_size_has_no_smaller_canvas(stack: ExitStack, tiny_model: Any, tmp_path: Path) -> None:
    fixed = tiny_model.save(tmp_path / "fixed.onnx", fixed=(1, 64, 96))
    assert len(open_plans(stack, fixed, None, cheaper=True)) == 1


def test_fallbacks_come_in_their_order_and_know_the_same_classes(
    stack: ExitStack, tiny_onnx: Path, random_tiny_model: Random, tmp_path: Path
) -> None:
    other = random_tiny_model(seed=1).save(tmp_path / "other.onnx")
    names = [plan.name for plan in open_plans(stack, tiny_onnx, None, cheaper=True, fallbacks=[other])]
    assert names == [
        "one scale at 96 px", "one scale at 96 px by other.onnx", "one scale at 72 px by other.onnx",
        "one scale at 48 px by other.onnx",
    ]  # fmt: skip
    renamed = random_tiny_model(class_names=("a", "b", "c")).save(tmp_path / "renamed.onnx")
    with pytest.raises(UsageError, match="other classes"):
        open_plans(stack, tiny_onnx, None, cheaper=True, fallbacks=[renamed])


def test_the_graph_beside_is_of_the_same_checkpoint_and_makes_no_views(
    random_tiny_model: Random, tmp_path: Path
) -> None:
    asked = random_tiny_model(tta=True, checkpoint_sha256="a" * 64).spec
    path = tmp_path / "best.tta.onnx"
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    random_tiny_model(checkpoint_sha256="b" * 64).save(tmp_path / "another.onnx")
    random_tiny_model(checkpoint_sha256="a" * 64, head="decoded").save(tmp_path / "for_others.onnx")
    assert _beside(path, asked) == []
    plain = random_tiny_model(checkpoint_sha256="a" * 64).save(tmp_path / "best.onnx")
    assert _beside(path, asked) == [plain]
