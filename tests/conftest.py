"""What several test files need: the shared data, the command line, and which tests run unasked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest

from parkdet.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[1]


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


class RunCli(Protocol):
    """The type of the fixture `run_cli`."""

    def __call__(self, *arguments: str | Path) -> Outcome: ...


def pytest_configure() -> None:
    """A shell that starts its job in the background has it, and what it starts, ignore Ctrl-C: the tests send it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave benchmarks out unless `-m` names them, and skip what needs a GPU where there is none."""
    asked = config.option.markexpr
    if "bench" not in asked:
        left_out = [item for item in items if item.get_closest_marker("bench")]
        items[:] = [item for item in items if not item.get_closest_marker("bench")]
        config.hook.pytest_deselected(items=left_out)
    if not Path("/dev/nvidiactl").exists() and "SIMULATED_CUDA_ORDER" not in os.environ:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA device (/dev/nvidiactl)"))


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled graphs of the tests do not land in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of fixtures and real data beside the checkout."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder of shared fixtures and data at {folder}")
    return folder


@pytest.fixture
def run_cli(capfd: pytest.CaptureFixture[str]) -> RunCli:
    """Run `parkdet` in this process: `code, out, err = run_cli("infer", "--data", folder)`."""

    def run(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        sys.stdout.flush()
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture(scope="session")
def start_cli() -> Callable[..., subprocess.Popen[str]]:
    """Start `parkdet` as a process of its own: for signals, pipes and what an import brings."""

    def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "parkdet.cli.main", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    return start
