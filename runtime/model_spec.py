"""What a model is, written into every artifact so that nobody has to guess."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from parkdet.runtime.errors import ArtifactError

SPEC_KEY = "parkdet.spec"
"""Name under which the spec's JSON stands in ONNX metadata, OpenVINO runtime info and checkpoints."""
SPEC_VERSION = 1

Precision = Literal["fp32", "fp16", "int8"]
InputFormat = Literal["uint8-nhwc", "float-nchw"]
HeadKind = Literal["raw", "decoded", "plugin"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Name, element type (numpy's name) and shape of a graph's input or output; -1 where it is dynamic."""

    name: str
    dtype: str
    shape: tuple[int, ...]


_LARGEST_ANCHOR = 1e6
"""Pixels: beyond any use, and small enough for areas in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Class names, geometry and provenance of a detector: the same object from checkpoint to engine."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...] = ()
    """The data set's own id of every class, in class order; counted from 1 when none are given."""
    strides: tuple[int, ...]
    """Pixels a cell of each level, finest first."""
    anchors: tuple[tuple[tuple[float, float], ...], ...]
    """Width and height in canvas pixels of every anchor of every level."""
    imgsz: int
    """Length in pixels to which the image's long side is scaled."""
    conf: float = 0.01
    """Post-processing that the model was validated with, and runs with unless told otherwise: score threshold,"""
    iou: float = 0.7
    """IoU above which the lower of two boxes goes,"""
    max_det: int = 50
    """and detections kept an image. The defaults are the contest's."""
    split_seed: int = 100
    """Which images validated: the arguments of `runtime.split.split_ids`. The defaults are the contest's,"""
    split_count: int | None = None
    """whose 3,000 become an eighth of a smaller data set."""
    precision: Precision = "fp32"
    """Precision of the weights as stored."""
    tta: bool = False
    """Whether the graph makes the three test-time views (`views.py`) and returns the heads of each."""
    input_format: InputFormat = "uint8-nhwc"
    """What the graph takes: BGR canvases as OpenCV decodes them, or RGB from 0 to 1 as other tools expect."""
    head: HeadKind = "raw"
    """What it returns: raw heads, decoded boxes (B, N, 5 + nc) float32, or the NMS plugin's four outputs."""
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    checkpoint_sha256: str = ""

    def __post_init__(self) -> None:
        if not self.category_ids:
            object.__setattr__(self, "category_ids", tuple(range(1, len(self.class_names) + 1)))
        if not self.class_names:
            raise ValueError("a model needs at least one class")
        if len(self.category_ids) != len(self.class_names) or len(set(self.category_ids)) != len(self.category_ids):
            raise ValueError("there must be one category id, and another one, for every class")
        if len(self.strides) != len(self.anchors) or not self.strides:
            raise ValueError(f"{len(self.strides)} strides do not go with anchors of {len(self.anchors)} levels")
        if list(self.strides) != sorted(set(self.strides)) or self.strides[0] < 1:
            raise ValueError(f"strides must be positive and ascend: {self.strides}")
        if len({len(level) for level in self.anchors}) != 1 or not self.anchors[0]:
            raise ValueError("every level must have the same number of anchors")
        if any(not 0 < side <= _LARGEST_ANCHOR for level in self.anchors for anchor in level for side in anchor):
            raise ValueError(f"anchors have a width and a height, in pixels: {self.anchors}")
        if not (0 <= self.conf <= 1 and 0 <= self.iou <= 1 and self.max_det >= 1):
            raise ValueError(f"conf {self.conf}, iou {self.iou}, max_det {self.max_det} cannot be")
        for name, value, allowed in (
            ("precision", self.precision, get_args(Precision)),
            ("input_format", self.input_format, get_args(InputFormat)),
            ("head", self.head, get_args(HeadKind)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}, not {value}")
        if self.imgsz < 1:
            raise ValueError(f"imgsz must be positive, not {self.imgsz}")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_outputs(self) -> int:
        """Channels an anchor: four of the box, the objectness, one a class."""
        return 5 + len(self.class_names)

    @property
    def anchors_per_cell(self) -> int:
        return len(self.anchors[0])

    @property
    def stride_max(self) -> int:
        return self.strides[-1]

    def to_json(self) -> str:
        """One line of JSON, keys sorted: the same spec gives the same text."""
        values = {"version": SPEC_VERSION, **dataclasses.asdict(self)}
        return json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, where: str) -> ModelSpec:
        """Read a spec that `to_json` wrote. ArtifactError names `where` it stood."""
        try:
            values: dict[str, Any] = json.loads(text)
            version = values.pop("version")
            if version != SPEC_VERSION:
                raise ArtifactError(
                    f"{where}: its model spec has version {version}, this parkdet reads {SPEC_VERSION}; "
                    "run 'parkdet export' again"
                )
            tensors = {
                key: tuple(
                    TensorSpec(name=str(t["name"]), dtype=str(t["dtype"]), shape=tuple(map(int, t["shape"])))
                    for t in values.pop(key)
                )
                for key in ("inputs", "outputs")
            }
            return cls(
                class_names=tuple(map(str, values.pop("class_names"))),
                category_ids=tuple(map(int, values.pop("category_ids"))),
                strides=tuple(map(int, values.pop("strides"))),
                anchors=tuple(tuple((float(w), float(h)) for w, h in level) for level in values.pop("anchors")),
                inputs=tensors["inputs"],
                outputs=tensors["outputs"],
                **values,
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ArtifactError(
                f"{where}: its model spec cannot be read ({error}); run 'parkdet export' again"
            ) from error
