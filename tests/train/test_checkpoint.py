"""Checkpoints: ours, the public layout, damaged ones, and ones that mean harm."""

from __future__ import annotations

import io
import os
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parkdet.runtime.errors import ArtifactError, ParkdetError, UsageError
from parkdet.train import load_checkpoint, save_checkpoint
from parkdet.train.model.network import Yolov5, build_network
from tests.train.test_run_log import short_files


@pytest.fixture(scope="module")
def network() -> Yolov5:
    torch.manual_seed(0)
    return build_network("yolov5n6", ["차", "bus"], 320, category_ids=[5, 2]).eval()


def test_ours_come_back_and_torch_opens_them(network: Yolov5, tmp_path: Path) -> None:
    path = tmp_path / "체크포인트 1.pt"
    save_checkpoint(path, network, {"epoch": 3, "state": {"tensor": torch.arange(3)}})
    assert torch.load(path, weights_only=True)["format"] == "parkdet.checkpoint"
    found = load_checkpoint(path)
    assert found.spec.class_names == ("차", "bus")
    assert found.spec.category_ids == (5, 2)
    assert len(found.spec.checkpoint_sha256) == 64
    assert found.training["epoch"] == 3
    assert found.training["state"]["tensor"].tolist() == [0, 1, 2]
    assert not found.model.training
    assert list(tmp_path.iterdir()) == [path]
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(network(image), found.model(image), strict=True):
            # Convolutions are stored in float16: eleven bits.
            torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=5e-3)


def test_weights_beyond_float16_are_kept_as_they_are(network: Yolov5, tmp_path: Path) -> None:
    import copy

    large = copy.deepcopy(network)
    with torch.no_grad():
        large.first_conv.weight[0, 0, 0, 0] = 1e6
    save_checkpoint(tmp_path / "large.pt", large)
    assert load_checkpoint(tmp_path / "large.pt").model.first_conv.weight[0, 0, 0, 0] == 1e6


def test_a_write_that_fails_leaves_the_old_file(
    network: Yolov5, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, network)
    before = path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, network)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_within_the_write_is_said_with_the_file(network: Yolov5, tmp_path: Path) -> None:
    """Within torch.save, which has an error of its own for it."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, network)
    before = path.read_bytes()
    for most in (0, 1000, len(before) // 2, len(before) - 1):
        with short_files(most), pytest.raises(OSError, match="File too large") as caught:
            save_checkpoint(path, network)
        assert caught.value.filename == str(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


def public_classes() -> dict[str, type]:
    """Modules named as in a YOLOv5 clone, made for pickling and taken away before reading."""
    from torch import nn

    made = {}
    for module, names in (("models.yolo", ("Model", "Detect")), ("models.common", ("Conv",))):
        sys.modules[module] = types.ModuleType(module)
        for name in names:
            made[name] = type(name, (nn.Module,), {"__module__": module})
            setattr(sys.modules[module], name, made[name])
    sys.modules["models"] = types.ModuleType("models")
    return made


def write_public(path: Path, network: Yolov5, change: Callable[[dict[str, object]], object] = lambda _: None) -> None:
    """A file in the public layout of 2022 (`models.yolo.Model`, float16), holding the network's weights."""
    made = public_classes()
    try:
        root = made["Model"]()
        container = torch.nn.Sequential()
        for index, layer in enumerate(network.model):
            module = made["Detect" if index == len(network.model) - 1 else "Conv"]()
            for name, child in layer.named_children():
                module.add_module(name, renamed(child, made))
            for name, buffer in layer.named_buffers(recurse=False):
                module.register_buffer(name, buffer)
            container.add_module(str(index), module)
        root.add_module("model", container)
        architecture = [
            [list(row.inputs) if len(row.inputs) > 1 else row.inputs[0], row.repeats, row.kind, arguments(row)]
            for row in network.rows
        ]
        root.yaml = {
            "nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": 3,
            "backbone": architecture[:12], "head": architecture[12:],
        }  # fmt: skip
        root.names = ["차", "bus"]
        content: dict[str, object] = {
            "epoch": -1,
            "best_fitness": None,
            "model": root.half(),
            "ema": None,
            "date": "2022",
        }
        change(content)
        torch.save(content, path)
    finally:
        for module_name in ("models.yolo", "models.common", "models"):
            sys.modules.pop(module_name, None)


def renamed(child: torch.nn.Module, made: dict[str, type]) -> torch.nn.Module:
    """Our modules pickled as the public project's, torch's own as they are."""
    if type(child).__module__.startswith("torch") and not isinstance(child, torch.nn.Sequential | torch.nn.ModuleList):
        return child
    module = torch.nn.Sequential() if isinstance(child, torch.nn.Sequential | torch.nn.ModuleList) else made["Conv"]()
    for name, grandchild in child.named_children():
        module.add_module(name, renamed(grandchild, made))
    return module


def arguments(row: object) -> list[object]:
    kind, channels = row.kind, row.channels  # type: ignore[attr-defined]
    if kind == "Conv":
        return [channels, row.kernel, row.stride, *([row.padding] if row.padding is not None else [])]  # type: ignore[attr-defined]
    if kind == "C3":
        return [channels, row.shortcut]  # type: ignore[attr-defined]
    return {"SPPF": [channels, 5], "Upsample": [None, 2, "nearest"], "Concat": [1], "Detect": ["nc", "anchors"]}[kind]


def test_the_public_layout_opens_without_its_classes(network: Yolov5, tmp_path: Path) -> None:
    write_public(tmp_path / "public.pt", network)
    found = load_checkpoint(tmp_path / "public.pt")
    assert found.spec.class_names == ("차", "bus")
    assert found.spec.strides == (8, 16, 32, 64)
    assert found.spec.anchors == network.spec.anchors
    for (name, ours), theirs in zip(network.state_dict().items(), found.model.state_dict().values(), strict=True):
        assert torch.equal(ours.half().float() if ours.is_floating_point() else ours, theirs), name


def test_what_is_missing_in_a_public_file_is_named(network: Yolov5, tmp_path: Path) -> None:
    cases: list[tuple[Callable[[dict[str, object]], object], str]] = [
        (lambda content: content.pop("model"), "neither"),
        (lambda content: delattr(content["model"], "yaml"), "'yaml'"),
        (lambda content: delattr(content["model"], "names"), "'names'"),
        (lambda content: content["model"].model.pop(3), "tensors are missing|no Detect"),  # type: ignore[attr-defined]
        (lambda content: content["model"].model[0].conv.weight.data.fill_(float("nan")), "not finite"),  # type: ignore[attr-defined]
    ]
    for number, (change, message) in enumerate(cases):
        path = tmp_path / f"{number}.pt"
        write_public(path, network, change)
        with pytest.raises(ArtifactError, match=message):
            load_checkpoint(path)


def archive(path: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")


class Harm:
    """Runs a command when an ordinary unpickler opens it."""

    def __init__(self, function: Callable[..., object], *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, getattr, os.remove])
@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_means_harm_is_refused_and_nothing_runs(
    function: Callable[..., object], nested: bool, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    command = f"touch {witness}" if function is os.system else f"open({str(witness)!r}, 'w')"
    harm = Harm(function, command)
    archive(tmp_path / "evil.pt", pickle.dumps({"model": [harm], "epoch": 1} if nested else harm))
    with pytest.raises(ArtifactError, match=r"evil\.pt: refused: .*nothing of it was run"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not witness.exists()


def test_names_that_are_tolerated_are_not_imported(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('imported')")
    program = b"cmodels.yolo\nModel\n)R."  # GLOBAL models.yolo.Model, empty tuple, REDUCE
    archive(tmp_path / "inert.pt", program)
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(ArtifactError):
            load_checkpoint(tmp_path / "inert.pt")
        assert "models" not in sys.modules
    finally:
        sys.path.remove(str(tmp_path))


def test_files_that_are_no_checkpoints_say_what_they_are(network: Yolov5, tmp_path: Path) -> None:
    whole = io.BytesIO()
    torch.save({"weights": torch.zeros(2)}, whole)
    save_checkpoint(tmp_path / "whole.pt", network)
    contents = {
        "empty.pt": (b"", "is empty"),
        "text.pt": (b"hello", "not a zip archive"),
        "cut.pt": ((tmp_path / "whole.pt").read_bytes()[:-2000], "cut off"),
        "other.pt": (whole.getvalue(), "neither a parkdet checkpoint"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=f"{name}.*{message}"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(UsageError, match="no such file"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(UsageError):
        load_checkpoint(tmp_path)


def test_random_damage_never_ends_in_anything_but_our_errors(network: Yolov5, tmp_path: Path) -> None:
    import random

    write_public(tmp_path / "public.pt", network)
    with zipfile.ZipFile(tmp_path / "public.pt") as file:
        pickled = next(file.read(name) for name in file.namelist() if name.endswith("data.pkl"))
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(pickled)
        for _ in range(rng.choice([1, 3, 50])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        archive(tmp_path / "damaged.pt", bytes(damaged[: rng.randrange(len(damaged))]))
        with pytest.raises(ParkdetError):
            load_checkpoint(tmp_path / "damaged.pt")


def test_a_training_checkpoint_opens_with_all_that_it_carries(network: Yolov5, tmp_path: Path) -> None:
    import argparse
    import copy
    import datetime
    import pathlib

    import numpy as np

    def as_training_leaves_it(content: dict[str, object]) -> None:
        model = content["model"]
        assert isinstance(model, torch.nn.Module)
        average = copy.deepcopy(model)
        with torch.no_grad():
            average.model[0].conv.weight.fill_(0.5)  # type: ignore[union-attr, index]
        # Validation leaves grids behind that are one row of anchors, expanded.
        average.model[-1].anchor_grid = [torch.ones(1, 3, 1, 1, 2).expand(1, 3, 80, 80, 2)]  # type: ignore[union-attr, index]
        average.names = {1: "bus", 0: "차"}  # type: ignore[assignment]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        content.update(
            ema=average,
            updates=17,
            optimizer=optimizer.state_dict(),
            best_fitness=np.array([0.25]),
            opt={"save_dir": pathlib.PurePosixPath("runs/exp"), "imgsz": 416, "lr": np.float64(0.1), "empty": b""},
            hyp=argparse.Namespace(lr0=np.float32(0.1)),
            date=datetime.datetime(2022, 6, 1),
        )

    write_public(tmp_path / "last.pt", network, as_training_leaves_it)
    found = load_checkpoint(tmp_path / "last.pt")
    assert found.spec.class_names == ("차", "bus")
    assert found.spec.imgsz == 416
    assert bool((found.model.first_conv.weight == 0.5).all())
    assert found.model.first_conv.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("activation", "nn.LeakyReLU(0.1)", "activation"), ("channel_multiple", 16, "channel_multiple")],
)
def test_a_network_of_another_kind_is_refused_rather_than_computed_wrongly(
    network: Yolov5, tmp_path: Path, key: str, value: object, message: str
) -> None:
    write_public(tmp_path / "a.pt", network, lambda content: content["model"].yaml.update({key: value}))  # type: ignore[attr-defined]
    with pytest.raises(ArtifactError, match=message):
        load_checkpoint(tmp_path / "a.pt")


def test_another_activation_in_the_modules_is_refused(network: Yolov5, tmp_path: Path) -> None:
    def leaky(content: dict[str, object]) -> None:
        content["model"].model[4].act = torch.nn.LeakyReLU()  # type: ignore[attr-defined]

    write_public(tmp_path / "a.pt", network, leaky)
    with pytest.raises(ArtifactError, match="LeakyReLU"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_file_that_describes_more_than_it_holds_allocates_nothing(network: Yolov5, tmp_path: Path) -> None:
    def wide(content: dict[str, object]) -> None:
        content["model"].yaml["width_multiple"] = 1e6  # type: ignore[attr-defined]

    def deep(content: dict[str, object]) -> None:
        content["model"].yaml["depth_multiple"] = 1e12  # type: ignore[attr-defined]

    def expanded(content: dict[str, object]) -> None:
        conv = content["model"].model[0].conv  # type: ignore[attr-defined]
        conv.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float16).expand(conv.weight.shape))

    for name, change in (("wide", wide), ("deep", deep), ("expanded", expanded)):
        write_public(tmp_path / f"{name}.pt", network, change)
        with pytest.raises(ArtifactError, match=r"another shape|more than the|overlap"):
            load_checkpoint(tmp_path / f"{name}.pt")
    save_checkpoint(tmp_path / "ours.pt", network)
    content = torch.load(tmp_path / "ours.pt", weights_only=True)
    content["rows"][0]["channels"] = 10**9
    torch.save(content, tmp_path / "ours.pt")
    with pytest.raises(ArtifactError, match="not a whole parkdet checkpoint"):
        load_checkpoint(tmp_path / "ours.pt")


def test_archives_that_unfold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps(b"\0" * 10_000_000))
    with pytest.raises(ArtifactError, match="compressed or overlap"):
        load_checkpoint(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}))
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("archive/data.pkl", pickle.dumps({}))
    with pytest.raises(ArtifactError, match="two of its entries have one name"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "program",
    [
        b"}r\xff\xff\xff\x7f.",  # LONG_BINPUT: a memo of two thousand million entries
        b"}p4000000000\n.",  # PUT of the same kind
        b"]" * 100_000 + b"a" * 99_999 + b".",  # a list in a list in a list ...
        b"\x80\x02(K\x01K\x02" + b"t." * 3,
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # BINBYTES8 of 2^63 bytes
    ],
)
def test_programs_that_ask_for_the_impossible_end_in_our_errors(program: bytes, tmp_path: Path) -> None:
    archive(tmp_path / "hostile.pt", program)
    with pytest.raises(ArtifactError, match=r"hostile\.pt"):
        load_checkpoint(tmp_path / "hostile.pt")


def test_a_tree_that_is_its_own_child_is_refused(network: Yolov5, tmp_path: Path) -> None:
    def ring(content: dict[str, object]) -> None:
        model = content["model"]
        model._modules["again"] = model  # type: ignore[attr-defined]

    write_public(tmp_path / "ring.pt", network, ring)
    with pytest.raises(ArtifactError, match="there twice"):
        load_checkpoint(tmp_path / "ring.pt")


def test_tensors_of_a_gpu_are_stored_as_the_cpus(network: Yolov5, tmp_path: Path) -> None:
    class OfGpu(torch.Tensor):
        """Says where it lives and notes that it was brought over."""

        brought = 0

        def cpu(self, *_: object, **__: object) -> torch.Tensor:
            OfGpu.brought += 1
            return self.as_subclass(torch.Tensor)

    state = {"optimizer": {"state": {0: {"momentum_buffer": torch.ones(2).as_subclass(OfGpu)}}}, "list": [1, "a"]}
    save_checkpoint(tmp_path / "last.pt", network, {"state": state})
    assert OfGpu.brought == 1
    found = load_checkpoint(tmp_path / "last.pt").training["state"]
    assert found["optimizer"]["state"][0]["momentum_buffer"].tolist() == [1, 1]
    assert found["list"] == [1, "a"]
