"""The wheel, installed outside the checkout, works as the checkout does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)


def _copy(repository: Path, target: Path) -> Path:
    """The files of the checkout that a build reads: setuptools writes beside its sources."""
    packages = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, target)
    for folder in packages.values():
        shutil.copytree(repository / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def _build(source: Path) -> Path:
    """The wheel of the sources: offline, with the build backend of this environment."""
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", "dist", "."],
        cwd=source,
        check=True,
        timeout=300,
    )
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


def _install(wheel: Path, folder: Path) -> Path:
    """An environment with the wheel and with this environment's libraries, but not its parkdet.

    The libraries are shown by links: a .pth file would process this environment's own .pth files and
    so bring the checkout in.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    answer = subprocess.run([python, "-I", "-c", ask], capture_output=True, text=True, check=True)
    target = Path(answer.stdout.strip())
    for scheme in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(scheme).iterdir():
            ours = "parkdet" in entry.name
            if not ours and entry.suffix != ".pth" and not (target / entry.name).exists():
                (target / entry.name).symlink_to(entry)
    options = ["--quiet", "--no-index", "--no-deps", "--no-cache-dir"]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)],
        check=True,
        timeout=300,
    )
    return folder


def _run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [str(folder / "bin" / command[0]), *command[1:]]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packaging")
    return _install(_build(_copy(repository, folder / "source")), folder / "elsewhere")


def test_the_extras_for_engines_bring_the_bindings_that_run_them(repository: Path) -> None:
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("gpu", "rtx"):
        assert "cuda-bindings>=13" in extras[extra]


def test_the_command_answers(installed: Path) -> None:
    run = _run(installed, "parkdet", "--help")
    assert (run.returncode, run.stderr) == (0, "")
    assert " infer " in run.stdout


def test_every_module_is_there_and_none_comes_from_the_checkout(installed: Path, repository: Path) -> None:
    table = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    modules = [
        ".".join(["parkdet", *file.relative_to(repository).with_suffix("").parts]).removesuffix(".__init__")
        for folder in table.values()
        for file in sorted((repository / folder).rglob("*.py"))
    ]
    assert "parkdet.cli.main" in modules
    script = (
        "import sys; from importlib.util import find_spec\n"
        "for name in sys.argv[1:]: print(name, find_spec(name) and find_spec(name).origin)"
    )
    run = _run(installed, "python", "-P", "-c", script, *modules)
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        name, _, origin = line.partition(" ")
        assert origin.startswith(str(installed)), f"{name}: {origin}"


def test_the_packages_import_with_every_command_of_the_table(installed: Path) -> None:
    script = (
        "import parkdet.train, parkdet.runtime, parkdet.export, parkdet.submission\n"
        "from importlib import import_module; from parkdet.cli.main import COMMANDS\n"
        "for place, _ in COMMANDS.values(): getattr(import_module(place.split(':')[0]), place.split(':')[1])"
    )
    run = _run(installed, "python", "-P", "-c", script)
    assert (run.returncode, run.stderr) == (0, "")


def test_the_settings_are_shipped_as_they_are_in_the_checkout(installed: Path, repository: Path) -> None:
    script = (
        "from importlib.resources import files\n"
        "def walk(at, name=''):\n"
        "    for item in at.iterdir():\n"
        "        if item.is_dir(): walk(item, f'{name}{item.name}/')\n"
        "        elif item.name.endswith('.yaml'): print(f'{name}{item.name}', len(item.read_bytes()))\n"
        "walk(files('parkdet.configs'))"
    )
    run = _run(installed, "python", "-P", "-c", script)
    assert run.returncode == 0, run.stderr
    configs = repository / "configs"
    expected = {f"{file.relative_to(configs)} {file.stat().st_size}" for file in configs.rglob("*.yaml")}
    assert set(run.stdout.splitlines()) == expected
    assert expected


def test_doctor_calls_it_a_wheel(installed: Path) -> None:
    run = _run(installed, "parkdet", "doctor", "--json")
    assert '"source": "wheel"' in run.stdout, run.stderr


def test_a_package_that_pyproject_forgets_is_missing_from_the_wheel(repository: Path, tmp_path: Path) -> None:
    """What the tests above rest on: the build takes only what is listed."""
    source = _copy(repository, tmp_path / "source")
    text = (source / "pyproject.toml").read_text()
    assert '    "parkdet.train.model",\n' in text
    (source / "pyproject.toml").write_text(text.replace('    "parkdet.train.model",\n', ""))
    names = zipfile.ZipFile(_build(source)).namelist()
    assert "parkdet/train/__init__.py" in names
    assert not [name for name in names if name.startswith("parkdet/train/model/")]
