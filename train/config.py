"""The recipe: what `parkdet train --config` reads. Shipped ones are in configs/."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, create_model, field_validator, model_validator

from parkdet.runtime.errors import UsageError
from parkdet.runtime.settings import Settings, load_settings, parse_overrides
from parkdet.train.data.augment import AugmentSettings
from parkdet.train.data.image_store import CacheMode

ANCHORS_A_LEVEL = 3
MetricTerm = Literal["map", "map50", "map75"]
CONTEST_METRIC: dict[MetricTerm, float] = {"map50": 0.1, "map75": 0.9}
"""How the contest's reference chose its best checkpoint."""


class TrainSettings(AugmentSettings):
    """How one stage trains. The names are those that YOLOv5's users know; defaults are its low-augmentation ones."""

    epochs: int = Field(default=100, gt=0)
    imgsz: int = Field(default=640, gt=0)
    """Side of the square training canvas, and the long side in validation, in pixels."""
    batch_size: Annotated[int, Field(gt=0)] | Literal[-1] = 16
    """Images a batch, over all GPUs together; -1: as many as the GPU's memory holds (on a CPU, 16)."""
    nominal_batch: int = Field(default=64, gt=0)
    """Gradients are accumulated until about so many images were seen; weight decay is stated for it."""
    optimizer: Literal["SGD", "AdamW"] = "SGD"
    lr0: float = Field(default=0.01, gt=0)
    lrf: float = Field(default=0.01, gt=0, le=1)
    """The last epoch's learning rate as a share of `lr0`."""
    cos_lr: bool = False
    """Cosine schedule in place of the linear one."""
    momentum: float = Field(default=0.937, ge=0, lt=1)
    """SGD's momentum, or AdamW's first beta."""
    weight_decay: float = Field(default=0.0005, ge=0)
    warmup_epochs: float = Field(default=3.0, ge=0)
    warmup_momentum: float = Field(default=0.8, ge=0, lt=1)
    warmup_bias_lr: float = Field(default=0.1, ge=0)
    grad_clip: float = Field(default=10.0, ge=0)
    """Largest norm of all gradients together; 0 leaves them as they are."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """What stays of the averaged weights at each optimizer step, once the ramp is over."""
    ema_ramp: float = Field(default=2000.0, gt=0)
    """Optimizer steps after which 63 % of `ema_decay` is reached; a training of few steps needs a short one."""
    box: float = Field(default=0.05, ge=0)
    cls: float = Field(default=0.5, ge=0)
    cls_pw: float = Field(default=1.0, gt=0)
    obj: float = Field(default=1.0, ge=0)
    obj_pw: float = Field(default=1.0, gt=0)
    iou_t: float = Field(default=0.2, ge=0, le=1)
    """Taken as YOLOv5's files have it, and without effect, there as here: matching is by `anchor_t`."""
    anchor_t: float = Field(default=4.0, gt=1)
    """Largest ratio of a box's side to its anchor's, or the reverse, at which the two are matched."""
    autoanchor: bool = True
    """Before a run's first stage, see whether the anchors fit the boxes, and fit them where they do not."""
    fl_gamma: float = Field(default=0.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    image_weights: bool = False
    """Draw images by how rare and how badly detected their classes are."""
    multi_scale: bool = False
    """Train every batch at a random size from half to one and a half of `imgsz`."""
    rect: bool = False
    """Batches of images of like aspect on canvases of that aspect, in place of mosaics on squares."""
    freeze: Annotated[int, Field(ge=0)] | tuple[int, ...] = 0
    """Layers whose weights stay: the first so many (10 is the backbone of P5), or those in a list."""
    epoch_parts: int = Field(default=1, gt=0)
    """An epoch is a random 1 / parts of the training set, drawn with replacement where parts > 1."""
    close_mosaic: int = Field(default=0, ge=0)
    """The last so many epochs show whole images, no mosaics: as the network will see them."""
    val_period: int = Field(default=1, ge=0)
    """Validate every so many epochs; 0: after the last one only."""
    patience: int = Field(default=100, ge=0)
    """End the stage when so many epochs went by without a better validation; 0: never."""
    save_period: int = Field(default=0, ge=-1)
    """Keep weights/epochN.pt every so many epochs; 0 or -1: none."""
    save_minutes: float = Field(default=5.0, gt=0)
    """last.pt is also written within an epoch when it is older than this."""
    precision: Literal["auto", "fast", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass. auto: bf16, else fp16, on a GPU, fp32 on a CPU; fast: bf16 there too where
    the CPU has instructions for it (AMX, AVX512_BF16)."""
    cache: CacheMode = "none"
    """Keep the decoded and scaled images in memory, or on disk, uncompressed, in `cache_dir`."""
    cache_dir: str | None = None
    """Folder of the disk cache, shared by all runs; without it `parkdet/images` in the user's cache folder."""
    sync_bn: bool = True
    """Let normalisation see the images of all GPUs (SyncBatchNorm)."""
    seed: int = Field(default=0, ge=0)
    deterministic: bool = False
    """Repeatable kernels on a GPU too, where CUDA has them; on a CPU equal runs always give equal weights."""


class SplitSettings(Settings):
    """Which images validate: drawn with `random.Random(seed).sample` from the ids in the file's order."""

    seed: int = 100
    count: int | None = Field(default=None, gt=0)
    """How many; without it the smaller of 3,000 and an eighth."""


class ValSettings(Settings):
    """Post-processing in validation: the runtime's own. The checkpoint records it, and inference uses it."""

    conf: float = Field(default=0.01, ge=0, le=1)
    iou: float = Field(default=0.7, ge=0, le=1)
    max_det: int = Field(default=50, gt=0)
    metric: dict[MetricTerm, float] = Field(default_factory=lambda: dict(CONTEST_METRIC), min_length=1)
    """Weights of the sum by which the best checkpoint is chosen."""


# A stage is a name and any of the settings of `train`, which it replaces.
_StageFields: Any = create_model(
    "_StageFields",
    __base__=Settings,
    **{  # type: ignore[call-overload]
        # The bounds stand beside the type: without them a stage could say what `train` may not.
        name: (Annotated[field.annotation, *field.metadata] | None if field.metadata else field.annotation | None, None)  # type: ignore[operator]
        for name, field in TrainSettings.model_fields.items()
    },
)


class StageSettings(_StageFields):  # type: ignore[misc]  # made above from TrainSettings' fields
    """One training among several in a row; each starts from the weights of the one before."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")


class Recipe(Settings):
    """The whole of a training: network, split, settings, and the stages if there are several."""

    model: str = "yolov5n"
    weights: str | None = None
    """Checkpoint to start from; random weights without it."""
    split: SplitSettings = SplitSettings()
    val: ValSettings = ValSettings()
    train: TrainSettings = TrainSettings()
    stages: tuple[StageSettings, ...] = ()

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages need different names, not {', '.join(names)}")
        return self

    def stage_settings(self) -> tuple[tuple[str, TrainSettings], ...]:
        """Name and full settings of every stage in order; one without a name where no stages are listed."""
        if not self.stages:
            return (("", self.train),)
        common = self.train.model_dump()
        return tuple(
            (
                stage.name,
                TrainSettings.model_validate({**common, **stage.model_dump(exclude_none=True, exclude={"name"})}),
            )
            for stage in self.stages
        )


def shipped_recipes() -> dict[str, Path]:
    """The recipes in the package by name."""
    folder = resources.files("parkdet.configs")
    return {
        Path(entry.name).stem: Path(str(entry))
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


class _HypSettings(TrainSettings):
    """A file of YOLOv5's hyper-parameters, which may also say how many anchors a level has."""

    anchors: float | None = Field(default=None, ge=0)
    """Rounded there, as what its evolution leaves is no whole number; 0 stands for those of the network."""

    @field_validator("anchors")
    @classmethod
    def _as_networks_have(cls, anchors: float | None) -> float | None:
        if anchors is not None and round(anchors) not in (0, ANCHORS_A_LEVEL):
            raise ValueError(f"the networks have {ANCHORS_A_LEVEL} anchors a level; give that, or leave it out")
        return anchors


def hyp_overrides(path: Path) -> tuple[str, ...]:
    """The settings in a file of YOLOv5's hyper-parameters (`hyp.*.yaml`) as overrides. ConfigError as for a recipe.

    Its number of anchors must be the networks'. That it has them fitted to the boxes there, `autoanchor` does here.
    """
    settings = load_settings(_HypSettings, path)
    values = settings.model_dump(mode="json", exclude_unset=True, exclude={"anchors"})
    return tuple(f"train.{name}={json.dumps(value)}" for name, value in values.items())


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by name or one of the user's by path, with `key=value` overrides.

    An override of `train.X` wins over the stages' own X: the command line has the last word.
    """
    shipped = shipped_recipes()
    path = Path(name_or_path)
    if name_or_path in shipped:
        path = shipped[name_or_path]
    elif not path.is_file():
        raise UsageError(f"there is no recipe '{name_or_path}'; give a YAML file or one of {', '.join(shipped)}")
    recipe = load_settings(Recipe, path, overrides)
    overridden: set[str] = set()
    for override in parse_overrides(overrides, Recipe):
        if override.path == ("train",):
            overridden |= set(override.value)  # a mapping, or the recipe would not have loaded
        elif override.path[:-1] == ("train",):
            overridden.add(override.path[-1])
    stages = tuple(
        stage.model_copy(update={name: getattr(recipe.train, name) for name in overridden}) for stage in recipe.stages
    )
    return recipe.model_copy(update={"stages": stages})
