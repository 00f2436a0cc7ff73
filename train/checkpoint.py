"""Checkpoints: tensors and plain types only, written whole or not at all. Reads the public YOLOv5 files too."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parkdet.runtime.errors import ArtifactError, ParkdetError
from parkdet.runtime.model_spec import ModelSpec
from parkdet.train.import_yolov5 import network_from_public, read_pickled_archive
from parkdet.train.model.layout import LayerRow
from parkdet.train.model.network import Yolov5

FORMAT = "parkdet.checkpoint"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A network as it was saved, and what the training needs to go on."""

    path: Path
    model: Yolov5
    """Float32, eval mode; a call with (B, 3, H, W) RGB from 0 to 1 gives the list of raw heads."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """State of the run that wrote it; empty where it cannot be resumed (best.pt, public files)."""

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Open one of our checkpoints or a public YOLOv5 one; nothing that the file holds is run.

    UsageError where there is no such file; ArtifactError where it is damaged or something else.
    """
    where = Path(path)
    content = read_pickled_archive(where)
    ours = isinstance(content, Mapping) and content.get("format") == FORMAT
    try:
        model = _network(content, where) if ours else network_from_public(content, where)
    except ParkdetError:
        raise
    except Exception as error:  # content that fits no rule can fail anywhere
        raise ArtifactError(f"{where}: no network can be built of it ({type(error).__name__}: {error})") from error
    model.spec = dataclasses.replace(model.spec, checkpoint_sha256=file_sha256(where))
    training = content.get("training") if ours else None
    return Checkpoint(where, model, training if isinstance(training, Mapping) else {})


def save_checkpoint(path: Path, model: Yolov5, training: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint: convolution weights in float16 as YOLOv5 keeps them, `training` as it is given.

    All tensors are stored as the CPU's, or a machine without a GPU could not open the file. Written beside, synced,
    renamed: an older file at `path` survives any failure.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "spec": model.spec.to_json(),
        "rows": [dataclasses.asdict(row) for row in model.rows],
        "model": {name: _stored(tensor) for name, tensor in model.state_dict().items()},
        "training": _on_cpu(training or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # torch's writer puts an error of its own before what the system said.
        said = error if isinstance(error, OSError) else error.__context__
        if not isinstance(said, OSError):
            raise
        # A write does not know the file's name; whoever reads the message needs it.
        raise OSError(said.errno, said.strerror or str(said), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what a process that was killed while it saved left in a folder of checkpoints."""
    for temporary in folder.glob(".*.pt.*.tmp"):
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stored(tensor: Tensor) -> Tensor:
    kept = tensor.detach().cpu().clone()
    if kept.dim() != 4:
        return kept  # biases, normalisation and anchors: few numbers, and the most sensitive ones
    half = kept.half()
    # What float16 cannot hold stays as it is, rather than becoming infinite.
    return half if bool(torch.isfinite(half).all()) else kept


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(inner) for inner in value)
    return value


def _network(content: Mapping[str, Any], where: Path) -> Yolov5:
    try:
        if content["version"] != VERSION:
            raise ArtifactError(
                f"{where}: a checkpoint of version {content['version']}, this parkdet reads {VERSION}; "
                "use the parkdet that wrote it"
            )
        rows = tuple(LayerRow(**{**row, "inputs": tuple(row["inputs"])}) for row in content["rows"])
        spec = ModelSpec.from_json(content["spec"], str(where))
        return Yolov5.from_state(rows, spec, content["model"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ArtifactError(f"{where}: not a whole parkdet checkpoint ({error}); train again") from error
