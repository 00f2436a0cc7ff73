"""The shape of the tree: who may import whom, what is shipped, how long a file may be, what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cli", "train", "export", "runtime", "submission", "configs")
ALLOWED = {
    "runtime": ("runtime",),
    "submission": ("submission", "runtime"),
    "train": ("train", "runtime", "configs"),
    "export": ("export", "runtime", "train.model", "train.checkpoint", "train.import_yolov5", "configs"),
    "cli": PACKAGES,
    "configs": (),
}
"""The arrows: a package -> the parts of parkdet that its files may import."""
TORCH_FREE = ("runtime", "submission")
LONGEST_FILE = 450


def sources(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Every (line, dotted module) that the source imports, at any depth; `from a import b` gives `a.b`.

    Relative imports come out with their dots. `import_module("x")` and `__import__("x")` count too.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                prefix = "." * node.level + (f"{node.module}." if node.module else "")
                yield from ((node.lineno, prefix + alias.name) for alias in node.names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def violations(package: str, source: str) -> list[str]:
    """What a file of the package imports against the arrows."""
    found = []
    for line, module in imports(source):
        if module.startswith("."):
            found.append(f"{line}: {module} is relative")
        elif module.split(".")[0] in PACKAGES:
            found.append(f"{line}: {module} lacks its prefix parkdet")
        elif module.split(".")[0] == "parkdet":
            inside = module.removeprefix("parkdet.")
            if not any(f"{inside}.".startswith(f"{part}.") for part in ALLOWED[package]):
                found.append(f"{line}: parkdet.{package} may not import {module}")
        elif package in TORCH_FREE and module.split(".")[0] in ("torch", "torchvision", "ultralytics"):
            found.append(f"{line}: parkdet.{package} never imports torch")
    return found


@pytest.mark.parametrize(
    ("package", "source", "count"),
    [
        ("runtime", "", 0),
        ("runtime", "from parkdet.runtime.errors import DataError\nimport numpy", 0),
        ("runtime", "def f():\n    if True:\n        import torch.nn", 1),
        ("runtime", "from parkdet.train.model import network", 1),
        ("runtime", "from parkdet import train", 1),
        ("runtime", "from importlib import import_module\nimport_module('parkdet.cli.main')", 1),
        ("submission", "from parkdet.runtime import store\nfrom parkdet.submission import cut", 0),
        ("submission", "import parkdet.export.graph", 1),
        ("train", "import torch\nfrom parkdet.runtime.nms import candidates", 0),
        ("train", "from . import loop", 1),
        ("train", "from parkdet.cli.main import main", 1),
        ("export", "from parkdet.train.model.network import Model\nimport parkdet.train.checkpoint", 0),
        ("export", "from parkdet.train.models import Model", 1),
        ("export", "from parkdet.train import load_checkpoint", 1),
        ("export", "from train.model import network", 1),
        ("cli", "from parkdet.train.cli import train", 0),
    ],
)
def test_the_detector_of_forbidden_imports(package: str, source: str, count: int) -> None:
    assert len(violations(package, source)) == count


@pytest.mark.parametrize("package", PACKAGES)
def test_the_arrows_hold(package: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}:{violation}"
        for file in sources(package)
        for violation in violations(package, file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_pyproject_lists_the_folders_that_exist() -> None:
    table = pyproject()["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT) for file in sources(*PACKAGES)}
    assert set(table["packages"]) == {".".join(["parkdet", *folder.parts]) for folder in folders}
    assert table["package-dir"] == {f"parkdet.{package}": package for package in PACKAGES}


def test_every_folder_with_code_is_a_package() -> None:
    lacking = {file.parent for file in sources(*PACKAGES)} - {
        file.parent for file in sources(*PACKAGES) if file.name == "__init__.py"
    }
    assert not lacking


def test_every_file_that_is_not_code_is_package_data() -> None:
    shipped = {
        path
        for package, patterns in pyproject()["tool"]["setuptools"].get("package-data", {}).items()
        for pattern in patterns
        for path in (ROOT / Path(*package.removeprefix("parkdet.").split("."))).glob(pattern)
    }
    there = {
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert there - shipped == set(), "not in [tool.setuptools.package-data]"


@pytest.mark.parametrize("file", sources(*PACKAGES, "tests"), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_is_short_enough_to_read(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_the_links_for_type_checkers_are_complete() -> None:
    links = {path.name: path for path in (ROOT / ".typing" / "parkdet").iterdir()}
    assert set(links) == set(PACKAGES)
    assert all(path.is_symlink() and path.resolve() == ROOT / name for name, path in links.items())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "from parkdet.cli.main import main; main(['--help'])",
            {"torch", "numpy", "cv2", "polars", "pyarrow", "pydantic", "yaml", "openvino", "hotcoco"},
        ),
        ("import parkdet.runtime, parkdet.train, parkdet.export, parkdet.submission", {"torch", "cv2", "openvino"}),
        ("from parkdet.runtime import Detector, Letterbox, decode_heads, evaluate", {"torch", "parkdet.train"}),
    ],
)
def test_what_an_import_does_not_bring(statement: str, absent: set[str]) -> None:
    script = f"import sys; {statement}; print(*sys.modules, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not absent & set(run.stderr.split())
