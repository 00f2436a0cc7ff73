"""The public YOLOv5 checkpoints, read without importing what they name or running what they hold.

A public `.pt` is a zip archive with a pickle of Python objects (`models.yolo.Model`, ...) and one file a tensor
storage. The pickle machine here builds tensors and plain containers itself; every class of a network becomes an
inert record of its attributes; any other name stops the reading.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parkdet.runtime.errors import ArtifactError, UsageError
from parkdet.runtime.model_spec import ModelSpec
from parkdet.train.model.layout import rows_from_public
from parkdet.train.model.network import Yolov5, level_strides

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

_INERT_ROOTS = ("models.", "utils.", "ultralytics.", "torch.nn.", "numpy", "pathlib", "argparse", "datetime")
"""Modules whose classes a YOLOv5 training leaves in its checkpoints. They are recorded, never imported."""


class InertObject:
    """What an object of a class that is not built here left behind: its attributes and arguments."""

    def __init__(self, *arguments: Any, **named: Any):
        self.__dict__.update(named)
        self.__dict__["_arguments"] = arguments

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        for part in parts:
            if isinstance(part, Mapping):
                self.__dict__.update({str(key): value for key, value in part.items()})

    def __call__(self, *arguments: Any, **named: Any) -> InertObject:
        return InertObject(*arguments, **named)


class _Storage:
    """A tensor storage: bytes of one file in the archive."""

    def __init__(self, values: Tensor):
        self.values = values


def read_pickled_archive(path: Path) -> Any:
    """The object in a zip archive that `torch.save` wrote, made of tensors, plain containers and InertObjects.

    UsageError where there is no file; ArtifactError where it is not such an archive, is damaged, or names
    something that no YOLOv5 checkpoint holds. Nothing that the file names is imported or called.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(set(names)) != len(names):
                raise ArtifactError(f"{path}: two of its entries have one name; torch.save writes no such file")
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ArtifactError(
                    f"{path}: its entries are compressed or overlap, which torch.save does not do; "
                    "save the checkpoint again with torch.save"
                )
            pickled = [name for name in names if name.endswith("/data.pkl")]
            if len(pickled) != 1:
                raise ArtifactError(f"{path}: a zip archive, but not one that torch.save wrote")
            if any(name.endswith("/constants.pkl") for name in names):
                raise ArtifactError(f"{path}: a TorchScript archive; give the checkpoint it was exported from")
            return _Unpickler(archive, pickled[0].removesuffix("data.pkl"), path).load()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        size = path.stat().st_size
        reason = "is empty" if size == 0 else "is not a zip archive, or was cut off"
        raise ArtifactError(
            f"{path}: {reason} ({size:,} bytes); copy or download the checkpoint again "
            "(files from before PyTorch 1.6 must be saved again with a newer one)"
        ) from error
    except ArtifactError:
        raise
    except Exception as error:  # a hostile pickle can raise anything at all
        raise ArtifactError(f"{path}: damaged ({type(error).__name__}: {error})") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, prefix: str, path: Path):
        program = archive.read(f"{prefix}data.pkl")
        _check_memo(program, path)
        super().__init__(io.BytesIO(program), encoding="utf-8")
        self._archive, self._prefix, self._path = archive, prefix, path
        self._storages: dict[str, _Storage] = {}
        self._builders: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,
            ("builtins", "dict"): dict,
            # The factory would be called by whoever looks a key up: an ordinary dict will do.
            ("collections", "defaultdict"): lambda *_: {},
            ("torch", "Size"): tuple,
            # Bytes in NumPy's scalars and arrays (best_fitness is one), as pickle protocol 2 writes them.
            ("_codecs", "encode"): _latin1_bytes,
            ("__builtin__", "bytes"): lambda *_: b"",
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (builder := self._builders.get((module, name))) is not None:
            return builder
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        if f"{module}.".startswith(_INERT_ROOTS) or module in _INERT_ROOTS or module == "torch":
            return type(name, (InertObject,), {"__module__": f"checkpoint:{module}"})
        raise ArtifactError(
            f"{self._path}: refused: the checkpoint names '{module}.{name}', which no YOLOv5 checkpoint needs; "
            "nothing of it was run. Do not open this file with other tools"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ArtifactError(f"{self._path}: holds a '{kind}' of {dtype}, not a tensor storage")
        if key not in self._storages:
            content = self._archive.read(f"{self._prefix}data/{key}")
            size = torch.empty(0, dtype=dtype).element_size()
            if len(content) < int(count) * size:
                raise ArtifactError(f"{self._path}: tensor file data/{key} is too short")
            # A bytearray, since torch warns of memory that it may not write to.
            values = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
            self._storages[key] = _Storage(values)
        return self._storages[key]


def _rebuild_tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    # as_strided refuses what lies outside the storage. A view, since one number can be expanded to any size.
    return storage.values.as_strided(tuple(size), tuple(stride), offset)


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _latin1_bytes(text: Any, _encoding: Any = None) -> bytes:
    return text.encode("latin1") if isinstance(text, str) else b""


def _check_memo(program: bytes, path: Path) -> None:
    """ArtifactError where the pickle numbers an object beyond its own length: a table of that size is allocated."""
    for operation, argument, _ in pickletools.genops(program):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= len(program):
            raise ArtifactError(f"{path}: refused: its pickle asks for a table of {argument} objects")


def network_from_public(content: Any, where: Path) -> Yolov5:
    """The network of a public checkpoint's content, float32, eval mode: its EMA where there is one.

    ArtifactError names what is missing or does not fit.
    """
    if not isinstance(content, Mapping):
        raise ArtifactError(f"{where}: holds a {type(content).__name__}, not a checkpoint")
    model = content.get("ema") or content.get("model")
    if not isinstance(model, InertObject):
        raise ArtifactError(
            f"{where}: neither a parkdet checkpoint nor a YOLOv5 one with a 'model'; "
            f"its keys: {', '.join(map(str, content))}"
        )
    layout = getattr(model, "yaml", None)
    if not isinstance(layout, Mapping):
        raise ArtifactError(f"{where}: its model has no 'yaml', from which YOLOv5 networks are built")
    try:
        state = dict(_tensors(model, "", set()))
    except (RecursionError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{where}: its modules are not YOLOv5's ({type(error).__name__}: {error})") from error
    rows = rows_from_public(layout, str(where))
    try:
        strides = level_strides(rows)
        cells = state[f"model.{len(rows) - 1}.anchors"].double()
    except (KeyError, ValueError, IndexError) as error:
        raise ArtifactError(f"{where}: its last layer is no Detect with anchors ({error})") from error
    pixels = cells.view(len(strides), -1, 2) * torch.tensor(strides).view(-1, 1, 1)
    names = _class_names(model, where)
    spec = ModelSpec(
        class_names=names,
        strides=strides,
        anchors=tuple(tuple((round(w, 4), round(h, 4)) for w, h in level) for level in pixels.tolist()),
        imgsz=_trained_imgsz(content.get("opt"), strides),
    )
    try:
        network = Yolov5.from_state(rows, spec, state)
    except ValueError as error:
        raise ArtifactError(f"{where}: {error}") from error
    if any(not bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values()):
        raise ArtifactError(f"{where}: weights are not finite; the training that wrote them had diverged")
    return network


def _trained_imgsz(options: Any, strides: tuple[int, ...]) -> int:
    """What a training's options say; without them the size that the public files were trained at."""
    given = options.get("imgsz") if isinstance(options, Mapping) else getattr(options, "imgsz", None)
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    return 1280 if strides[-1] >= 64 else 640


def _class_names(model: InertObject, where: Path) -> tuple[str, ...]:
    names = getattr(model, "names", None)
    if isinstance(names, Mapping):
        names = [names[key] for key in sorted(names)]
    if not isinstance(names, list | tuple) or not names:
        raise ArtifactError(f"{where}: its model has no class 'names'")
    return tuple(str(name) for name in names)


def _tensors(module: Any, prefix: str, seen: set[int]) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of a recorded module tree under the names its state dict would have."""
    found: list[tuple[str, Tensor]] = []
    # Activations, which hold nothing, are shared by many layers; anything else met twice could multiply without end.
    if any(getattr(module, table, None) for table in ("_parameters", "_buffers", "_modules")):
        if id(module) in seen:
            raise TypeError(f"{prefix.removesuffix('.')} is there twice")
        seen.add(id(module))
    for table in ("_parameters", "_buffers"):
        for name, value in (getattr(module, table, None) or {}).items():
            if isinstance(value, Tensor):
                found.append((f"{prefix}{name}", value))
    for name, child in (getattr(module, "_modules", None) or {}).items():
        if name == "act" and type(child).__name__ != "SiLU":
            raise TypeError(f"{prefix}act is a {type(child).__name__}, where YOLOv5 v6 has a SiLU")
        if child is not None:
            found += _tensors(child, f"{prefix}{name}.", seen)
    return found
