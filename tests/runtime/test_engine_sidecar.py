"""An engine's sidecar: written and read back, and one sentence for each way in which it does not fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parkdet.runtime import ModelSpec
from parkdet.runtime.engine_sidecar import EngineSidecar, Flavour, ShapeRange, check, read, sidecar_path, write
from parkdet.runtime.errors import ArtifactError, ParkdetError
from parkdet.runtime.model_spec import TensorSpec

SPEC = ModelSpec(
    class_names=("차", "b"),
    strides=(8,),
    anchors=(((10.0, 13.0),),),
    imgsz=640,
    precision="fp16",
    checkpoint_sha256="c" * 64,
)
BYTES = b"an engine's bytes" * 100


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sidecar(**changes: Any) -> EngineSidecar:
    made = EngineSidecar(
        spec=SPEC,
        flavour="tensorrt",
        version="10.16.1.11",
        architectures=(86,),
        batch=ShapeRange(low=1, best=8, high=16),
        canvas_height=ShapeRange.fixed(896),
        canvas_width=ShapeRange.fixed(1600),
        graph_sha256=sha(b"the graph"),
        engine_sha256=sha(BYTES),
        engine_bytes=len(BYTES),
        build_seconds=12.5,
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "best.sm86.engine"
    path.write_bytes(BYTES)
    (tmp_path / "best.onnx").write_bytes(b"the graph")
    return path


def checked(engine: Path, flavour: Flavour = "tensorrt", version: str = "10.16.1.11", gpu: int | None = 86) -> None:
    check(engine, flavour=flavour, version=version, architecture=gpu, graph=engine.parent / "best.onnx")


def test_it_comes_back_as_it_was_written(engine: Path) -> None:
    assert write(engine, sidecar()) == engine.parent / "best.sm86.engine.json"
    assert read(engine) == sidecar()
    checked(engine)
    checked(engine, version="10.16.1.99")
    checked(engine, gpu=None)


def test_nothing_is_written_where_the_folder_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ParkdetError, match="cannot be written"):
        write(tmp_path / "none" / "x.engine", sidecar())


def test_an_engine_without_one_is_not_opened(engine: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no best\.sm86\.engine\.json beside it.*copy the two together"):
        checked(engine)
    with pytest.raises(ArtifactError, match="there is no such engine"):
        checked(engine.with_name("other.engine"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"version": "10.13.0"}, r"built with TensorRT 10\.16\.1\.11, this is 10\.13\.0; install 10\.16\.1\.11, or"),
        ({"version": "11.4.0.106"}, r"this is 11\.4\.0\.106"),
        ({"gpu": 75}, r"built for compute capability 8\.6, this GPU has 7\.5; build one .*--arch 75"),
        ({"flavour": "tensorrt-rtx"}, r"is an engine of TensorRT and cannot be run by TensorRT for RTX"),
    ],
)
def test_each_mismatch_has_its_sentence(engine: Path, arguments: dict[str, Any], message: str) -> None:
    write(engine, sidecar())
    with pytest.raises(ArtifactError, match=message):
        checked(engine, **arguments)


def test_ampere_plus_runs_on_newer_gpus_only(engine: Path) -> None:
    write(engine, sidecar(architectures=(80,), hardware_compatibility="ampere-plus"))
    checked(engine, gpu=120)
    with pytest.raises(ArtifactError, match=r"this GPU has 7\.5"):
        checked(engine, gpu=75)


def test_a_file_that_is_cut_off_damaged_or_of_another_graph(engine: Path) -> None:
    write(engine, sidecar())
    engine.write_bytes(BYTES[:-5])
    with pytest.raises(ArtifactError, match=r"is cut off: 1,695 of 1,700 bytes"):
        checked(engine)
    engine.write_bytes(BYTES[:-1] + b"?")
    with pytest.raises(ArtifactError, match=r"not the file that best\.sm86\.engine\.json describes"):
        checked(engine)
    engine.write_bytes(BYTES + b"?")
    with pytest.raises(ArtifactError, match=r"not the file that best\.sm86\.engine\.json describes"):
        checked(engine)
    engine.write_bytes(BYTES)
    (engine.parent / "best.onnx").write_bytes(b"another graph")
    with pytest.raises(ArtifactError, match=r"built from another graph than .*best\.onnx"):
        checked(engine)


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    def change(values: dict[str, Any]) -> None:
        del values[key]

    return change


def setting(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(values: dict[str, Any]) -> None:
        values[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("engine_sha256"), "lacks 'engine_sha256'"),
        (without("spec"), "lacks 'spec'"),
        (without("version_of_this_file"), "lacks 'version_of_this_file'"),
        (without("architectures"), "lacks 'architectures'"),
        (setting("version_of_this_file", 2), "version 2, this parkdet reads 1"),
        (setting("architectures", []), "architectures are compute capabilities"),
        (setting("architectures", ["86"]), "architectures is '86'"),
        (setting("architectures", 86), "cannot be read"),
        (setting("engine_bytes", "many"), "engine_bytes is 'many'"),
        (setting("engine_bytes", True), "engine_bytes is True"),
        (setting("batch", {"low": 4, "best": 2, "high": 8}), "a range is"),
        (setting("flavour", "openvino"), "flavour is one of"),
        (setting("colour", "red"), "colour"),
        (setting("gpu", "\ud800"), "was changed after it was written"),
        (setting("spec", {"version": 1}), "cannot be read"),
    ],
)
def test_a_sidecar_edited_by_hand(engine: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    path = write(engine, sidecar())
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=message):
        checked(engine)


def leaves(values: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a JSON document that is neither a list nor an object."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [way for key, value in inner for way in leaves(value, (*at, key))] if inner else [at]


def test_no_value_of_a_sidecar_can_be_changed(engine: Path) -> None:
    tensors = (TensorSpec(name="images", dtype="uint8", shape=(-1, 896, 1600, 3)),)
    path = write(engine, sidecar(spec=dataclasses.replace(SPEC, inputs=tensors), gpu="a GPU", built_at="2026-01-01"))
    written = json.loads(path.read_text())
    ways = leaves(written)
    assert len(ways) > 40
    for *above, key in ways:
        values = json.loads(json.dumps(written))
        holder = values
        for step in above:
            holder = holder[step]
        match holder[key]:
            case bool(value):
                holder[key] = not value
            case int(value) | float(value):
                holder[key] = value + 1
            case str(value):
                holder[key] = f"{value}x"
        path.write_text(json.dumps(values))
        if holder[key] is not None:
            with pytest.raises(ArtifactError):
                checked(engine)
    path.write_text(json.dumps(written, indent=7))
    checked(engine)


def test_a_class_renamed_by_hand_has_its_sentence(engine: Path) -> None:
    path = write(engine, sidecar())
    path.write_text(path.read_text().replace('"b"', '"c"'))
    with pytest.raises(ArtifactError, match=r"was changed after it was written.*copy it anew, or build it again"):
        checked(engine)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_sidecar_that_is_none(engine: Path, content: bytes) -> None:
    sidecar_path(engine).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"best\.sm86\.engine\.json"):
        checked(engine)


def test_a_sidecar_that_cannot_be_opened(engine: Path) -> None:
    sidecar_path(engine).mkdir()
    with pytest.raises(ArtifactError, match=r"json: cannot be read \(Is a directory\)"):
        checked(engine)
