"""What an engine is, in a JSON file beside it: `best.sm86.engine` has `best.sm86.engine.json`.

An engine runs only where it was built for; the sidecar is read first, so that a mismatch is a sentence and not a null
pointer from a native library.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from parkdet.runtime.errors import ArtifactError
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.shards import write_atomically

SIDECAR_VERSION = 1
Flavour = Literal["tensorrt", "tensorrt-rtx"]
HardwareCompatibility = Literal["none", "same-compute-capability", "ampere-plus"]
_BUILD_AGAIN = "build it again with 'parkdet export'"
_CHECKSUM = "sha256_of_the_rest"
"""Key of the sidecar's own checksum: class names, anchors and ranges that were changed by hand fit any engine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeRange:
    """Smallest, preferred and largest value of one dimension that an engine was built for."""

    low: int
    best: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.best <= self.high:
            raise ValueError(f"a range is 1 <= low <= best <= high, not {self.low}, {self.best}, {self.high}")

    @classmethod
    def fixed(cls, value: int) -> ShapeRange:
        return cls(low=value, best=value, high=value)

    def __contains__(self, value: int) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low} to {self.high}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSidecar:
    """Spec, origin and home of an engine."""

    spec: ModelSpec
    """Of the engine: its inputs and outputs as they were read back, its precision, the checkpoint's SHA-256."""
    flavour: Flavour
    version: str
    """Of the TensorRT that built it, as its Python package says it: '10.16.1.11'."""
    architectures: tuple[int, ...]
    """Compute capabilities that it was built for: 86 is 8.6."""
    hardware_compatibility: HardwareCompatibility = "none"
    """Which other GPUs than `architectures` it runs on."""
    gpu: str = ""
    """Name of the GPU that timed its kernels; empty where it was built without one."""
    batch: ShapeRange
    canvas_height: ShapeRange
    canvas_width: ShapeRange
    graph_sha256: str
    """Of the ONNX file that it was built from."""
    engine_sha256: str
    engine_bytes: int
    build_seconds: float
    built_at: str = ""
    """UTC, ISO 8601."""

    def __post_init__(self) -> None:
        if self.flavour not in get_args(Flavour):
            raise ValueError(f"flavour is one of {', '.join(get_args(Flavour))}, not {self.flavour}")
        if self.hardware_compatibility not in get_args(HardwareCompatibility):
            raise ValueError(f"hardware compatibility '{self.hardware_compatibility}' is not known")
        if not self.architectures or not all(10 <= architecture <= 999 for architecture in self.architectures):
            raise ValueError(f"architectures are compute capabilities such as 86, not {self.architectures}")


def sidecar_path(engine: Path) -> Path:
    """Where an engine's sidecar lies."""
    return engine.with_name(f"{engine.name}.json")


def architecture_of(major: int, minor: int) -> int:
    """Compute capability as one number: 8.6 is 86."""
    return major * 10 + minor


def write(engine: Path, sidecar: EngineSidecar) -> Path:
    """Write the sidecar beside an engine, whole or not at all; returns its path."""
    values = {"version_of_this_file": SIDECAR_VERSION, **dataclasses.asdict(sidecar)}
    values["spec"] = json.loads(sidecar.spec.to_json())
    values = json.loads(json.dumps(values))
    values[_CHECKSUM] = _sha256_of_values(values)
    path = sidecar_path(engine)
    text = json.dumps(values, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    write_atomically(path, text.encode())
    return path


def read(engine: Path) -> EngineSidecar:
    """The sidecar beside an engine. ArtifactError where it is missing, damaged or of another version."""
    path = sidecar_path(engine)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(
            f"{engine}: has no {path.name} beside it, so nobody knows what it is; "
            f"copy the two together, or {_BUILD_AGAIN}"
        ) from None
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: is not text ({error}); {_BUILD_AGAIN}") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        values: dict[str, Any] = json.loads(text)
        version = values.pop("version_of_this_file")
        if version != SIDECAR_VERSION:
            raise ArtifactError(
                f"{path}: is a sidecar of version {version}, this parkdet reads {SIDECAR_VERSION}; {_BUILD_AGAIN}"
            )
        _typed(_CHECKSUM, values.pop(_CHECKSUM), str)
        spec = ModelSpec.from_json(json.dumps(values.pop("spec")), str(path))
        ranges: dict[str, Any] = {key: _range(values.pop(key)) for key in ("batch", "canvas_height", "canvas_width")}
        checked: dict[str, Any] = {
            key: _typed(key, values.pop(key), kind)
            for key, kind in (
                ("version", str), ("gpu", str), ("graph_sha256", str), ("engine_sha256", str), ("engine_bytes", int),
                ("built_at", str),
            )
        }  # fmt: skip
        architectures = tuple(_typed("architectures", value, int) for value in values.pop("architectures"))
        seconds = float(values.pop("build_seconds"))
        return EngineSidecar(
            spec=spec, architectures=architectures, build_seconds=seconds, **checked, **ranges, **values
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
        raise ArtifactError(f"{path}: {what}; {_BUILD_AGAIN}") from error


def _range(values: Any) -> ShapeRange:
    return ShapeRange(**{key: _typed(key, values[key], int) for key in ("low", "best", "high")})


def _typed(key: str, value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{key} is {value!r}")
    return value


def check(
    engine: Path,
    *,
    flavour: Flavour,
    version: str,
    architecture: int | None,
    graph: Path | None = None,
) -> EngineSidecar:
    """The sidecar of an engine that can run here. ArtifactError says what is in the way, and the remedy.

    `version` is the installed TensorRT's, `architecture` the GPU's compute capability as one number (None where there
    is no GPU to ask, as when an engine is only inspected), `graph` the ONNX file that the engine is to be of.
    """
    if not engine.is_file():
        raise ArtifactError(f"{engine}: there is no such engine; {_BUILD_AGAIN}")
    sidecar = read(engine)
    size = engine.stat().st_size
    if size < sidecar.engine_bytes:
        raise ArtifactError(
            f"{engine}: is cut off: {size:,} of {sidecar.engine_bytes:,} bytes are there; "
            f"copy it anew, or {_BUILD_AGAIN}"
        )
    if sidecar.flavour != flavour:
        raise ArtifactError(
            f"{engine}: is an engine of {_name(sidecar.flavour)} and cannot be run by {_name(flavour)}; install "
            f"{_name(sidecar.flavour)}, or build one with 'parkdet export --engine {flavour}'"
        )
    if not _same_version(sidecar, version):
        raise ArtifactError(
            f"{engine}: was built with {_name(flavour)} {sidecar.version}, this is {version}; install "
            f"{sidecar.version}, or {_BUILD_AGAIN}"
        )
    if architecture is not None and not _runs_on(sidecar, architecture):
        built_for = ", ".join(map(_dotted, sidecar.architectures))
        raise ArtifactError(
            f"{engine}: was built for compute capability {built_for}, this GPU has {_dotted(architecture)}; "
            f"build one for it with 'parkdet export --engine {flavour} --arch {architecture}'"
        )
    if graph is not None and _sha256(graph) != sidecar.graph_sha256:
        raise ArtifactError(
            f"{engine}: was built from another graph than {graph} (their SHA-256 differ); "
            f"{_BUILD_AGAIN} from that graph"
        )
    if size != sidecar.engine_bytes or _sha256(engine) != sidecar.engine_sha256:
        raise ArtifactError(
            f"{engine}: is not the file that {sidecar_path(engine).name} describes (its SHA-256 differs): damaged, or "
            f"of another export; copy the two together, or {_BUILD_AGAIN}"
        )
    _refuse_edited(sidecar_path(engine))
    return sidecar


def _refuse_edited(path: Path) -> None:
    """ArtifactError where a sidecar that can be read is not as it was written."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.pop(_CHECKSUM) != _sha256_of_values(values):
        raise ArtifactError(
            f"{path}: was changed after it was written (its own SHA-256 differs), so what it says of the engine cannot "
            f"be trusted; copy it anew, or {_BUILD_AGAIN}"
        )


def _sha256_of_values(values: dict[str, Any]) -> str:
    text = json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    # Half a surrogate pair is valid JSON, and one of the things that a hand may leave behind.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _same_version(sidecar: EngineSidecar, version: str) -> bool:
    # A plan is read by the release that wrote it; the build number behind the third place changes no format.
    return sidecar.version.split(".")[:3] == version.split(".")[:3]


def _runs_on(sidecar: EngineSidecar, architecture: int) -> bool:
    if architecture in sidecar.architectures:
        return True
    return sidecar.hardware_compatibility == "ampere-plus" and architecture >= 80


def _dotted(architecture: int) -> str:
    return f"{architecture // 10}.{architecture % 10}"


def _name(flavour: str) -> str:
    return {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}[flavour]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
