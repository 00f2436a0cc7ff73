"""What a network is made of: stages from our YAML, or rows from a public checkpoint, to one list of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from parkdet.runtime.errors import ArtifactError
from parkdet.runtime.settings import Settings

LayerKind = Literal["Conv", "C3", "SPPF", "Upsample", "Concat", "Detect"]
Anchor = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
CHANNEL_MULTIPLE = 8
SPPF_KERNEL = 5


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer: where its input comes from (negative: counted back), how often, what, with which numbers."""

    inputs: tuple[int, ...]
    kind: LayerKind
    channels: int = 0
    repeats: int = 1
    kernel: int = 1
    stride: int = 1
    padding: int | None = None
    shortcut: bool = True


class Stage(Settings):
    """A downsampling convolution and a C3 block."""

    channels: int = Field(gt=0)
    repeats: int = Field(gt=0)


class Architecture(Settings):
    """A network of the YOLOv5 v6 family, before the number of classes is known: `configs/models/*.yaml`."""

    depth_multiple: float = Field(gt=0)
    width_multiple: float = Field(gt=0)
    stem_channels: int = Field(gt=0)
    stages: tuple[Stage, ...] = Field(min_length=2)
    anchors: tuple[tuple[Anchor, ...], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _levels_match(self) -> Architecture:
        if len(self.anchors) != len(self.stages) - 1:
            raise ValueError(
                f"{len(self.stages)} stages have {len(self.stages) - 1} levels, but there are anchors for "
                f"{len(self.anchors)}"
            )
        if len({len(level) for level in self.anchors}) != 1 or not self.anchors[0]:
            raise ValueError("every level needs the same number of anchors")
        return self

    def rows(self) -> tuple[LayerRow, ...]:
        """Stem, stages, pooling; the path down the levels with laterals; the path back up; Detect."""
        width = self._channels
        rows = [LayerRow((-1,), "Conv", width(self.stem_channels), kernel=6, stride=2, padding=2)]
        stage_ends: list[int] = []
        for stage in self.stages:
            rows.append(LayerRow((-1,), "Conv", width(stage.channels), kernel=3, stride=2))
            rows.append(LayerRow((-1,), "C3", width(stage.channels), self._repeats(stage.repeats)))
            stage_ends.append(len(rows) - 1)
        rows.append(LayerRow((-1,), "SPPF", width(self.stages[-1].channels), kernel=SPPF_KERNEL))

        levels = self.stages[1:]
        neck = self._repeats(3)
        laterals: list[int] = []
        for level in reversed(range(len(levels) - 1)):
            channels = width(levels[level].channels)
            laterals.append(len(rows))
            rows.append(LayerRow((-1,), "Conv", channels))
            rows.append(LayerRow((-1,), "Upsample"))
            rows.append(LayerRow((-1, stage_ends[level + 1]), "Concat"))
            rows.append(LayerRow((-1,), "C3", channels, neck, shortcut=False))
        outputs = [len(rows) - 1]
        for level, lateral in zip(range(len(levels) - 1), reversed(laterals), strict=True):
            rows.append(LayerRow((-1,), "Conv", width(levels[level].channels), kernel=3, stride=2))
            rows.append(LayerRow((-1, lateral), "Concat"))
            rows.append(LayerRow((-1,), "C3", width(levels[level + 1].channels), neck, shortcut=False))
            outputs.append(len(rows) - 1)
        rows.append(LayerRow(tuple(outputs), "Detect"))
        return tuple(rows)

    def _channels(self, channels: int) -> int:
        return scaled_channels(channels, self.width_multiple)

    def _repeats(self, repeats: int) -> int:
        return scaled_repeats(repeats, self.depth_multiple)


def scaled_channels(channels: int, multiple: float) -> int:
    """Channels after the width multiple: rounded up to a multiple of 8."""
    return math.ceil(channels * multiple / CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


def scaled_repeats(repeats: int, multiple: float) -> int:
    """Repeats after the depth multiple: at least one."""
    return max(round(repeats * multiple), 1) if repeats > 1 else repeats


def rows_from_public(layout: Mapping[str, Any], where: str) -> tuple[LayerRow, ...]:
    """Rows from the `yaml` dictionary that a public checkpoint carries: `[from, number, module, arguments]` each.

    ArtifactError names `where` the row is and what it holds, when it is not YOLOv5 v6.
    """
    try:
        depth, width = float(layout["depth_multiple"]), float(layout["width_multiple"])
        listed = [*layout["backbone"], *layout["head"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: the checkpoint's architecture lacks or garbles {error}") from error
    for key, usual in (("activation", "nn.SiLU()"), ("channel_multiple", CHANNEL_MULTIPLE)):
        if layout.get(key) not in (None, "", usual):
            raise ArtifactError(
                f"{where}: a network with the {key} {layout[key]} cannot be opened, only YOLOv5's own, {usual}"
            )
    return tuple(_public_row(row, depth, width, f"{where}: layer {i}") for i, row in enumerate(listed))


def _public_row(row: Sequence[Any], depth: float, width: float, where: str) -> LayerRow:
    try:
        source, number, module, arguments = row
        kind = str(module).removeprefix("nn.")
        inputs = tuple(int(i) for i in source) if isinstance(source, list | tuple) else (int(source),)
        if kind not in get_args(LayerKind):
            raise ArtifactError(
                f"{where} is a {module}, which YOLOv5 v6 (releases 6.0 to 7.0) does not have; "
                "older and modified networks cannot be opened"
            )
        if kind == "Upsample" and (arguments[1] != 2 or arguments[2] != "nearest"):
            raise ArtifactError(f"{where}: only nearest upsampling by 2 is known, not {arguments}")
        if kind in {"Upsample", "Concat", "Detect"}:
            return LayerRow(inputs, kind)  # type: ignore[arg-type]  # checked against LayerKind above
        channels = scaled_channels(int(arguments[0]), width)
        numbers = [int(value) for value in arguments[1:]]
        if kind != "Conv" and len(numbers) > 1:
            raise ArtifactError(f"{where}: a {kind} with the arguments {arguments} is not YOLOv5's")
        if kind == "C3":
            return LayerRow(inputs, "C3", channels, scaled_repeats(int(number), depth), shortcut=bool([*numbers, 1][0]))
        if kind == "SPPF":
            return LayerRow(inputs, "SPPF", channels, kernel=[*numbers, SPPF_KERNEL][0])
        kernel, stride, padding = (*numbers, *(1, 1, -1)[len(numbers) :])
        return LayerRow(
            inputs, "Conv", channels, kernel=kernel, stride=stride, padding=None if padding < 0 else padding
        )
    except (TypeError, ValueError, IndexError) as error:
        raise ArtifactError(f"{where} cannot be understood: {row} ({error})") from error
