"""`./dev` on machines that lack something, and what it does on the second call.

The Python that it finds is a stand-in: it answers as told, records what pip was asked for and installs
nothing. The real installation is the first thing that CI does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from parkdet.cli.main import COMMANDS

NEEDED_PROGRAMS = ("sh", "cat", "cksum", "cp", "mkdir", "chmod", "grep", "mv", "readlink", "rm", "sleep")

STAND_IN = """#!/bin/sh
case "$*" in
*"-m venv"*)
    for folder; do :; done
    mkdir -p "$folder/bin"
    cp "$0" "$folder/bin/python"
    printf '#!/bin/sh\\necho parkdet in "$PWD": "$@"\\n' >"$folder/bin/parkdet"
    chmod +x "$folder/bin/parkdet"
    ;;
*"-m pip"*)
    echo "$*" >>"$RECORD"
    sleep "${PIP_SECONDS-0}"
    if [ -n "${PIP_SAYS-}" ]; then
        while [ "$1" != --log ]; do shift; done
        echo "$PIP_SAYS" >>"$2"
        exit 1
    fi
    ;;
*"-m pytest"* | *"-m ruff"* | *"-m mypy"*) echo "$*" ;;
*ensurepip*) exit "${NO_VENV-0}" ;;
*sys.version_info\\[:2\\]* | *"sys.version_info[:2]"*) echo "${VERSION-3.11}" ;;
*"import pip"*) ;;
*) exec REAL_PYTHON "$@" ;;
esac
"""


@dataclass(frozen=True)
class Checkout:
    """A copy of what `./dev` reads, beside a PATH on which only the stand-in is a Python."""

    root: Path
    programs: Path
    record: Path

    def start(self, *arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.root / "dev"), *arguments],
            cwd=cwd,
            env={"PATH": str(self.programs), "RECORD": str(self.record), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, cwd: Path | None = None, **variables: str) -> tuple[int, str, str]:
        process = self.start(*arguments, cwd=cwd, **variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def installations(self) -> int:
        """How often pip was asked to install the project."""
        if not self.record.exists():
            return 0
        return sum("--editable" in line for line in self.record.read_text().splitlines())


@pytest.fixture
def checkout(tmp_path: Path, repository: Path) -> Checkout:
    root = tmp_path / "a folder with spaces"
    (root / "constraints").mkdir(parents=True)
    for name in ("dev", "pyproject.toml", "constraints/cpu.txt"):
        shutil.copy(repository / name, root / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in NEEDED_PROGRAMS:
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    python = programs / "python3"
    python.write_text(STAND_IN.replace("REAL_PYTHON", f'"{sys.executable}"'))
    python.chmod(0o755)
    return Checkout(root, programs, tmp_path / "pip calls")


@pytest.mark.parametrize("arguments", [(), ("-h",), ("help",)])
def test_without_a_command_it_prints_its_usage_and_needs_no_python(
    checkout: Checkout, arguments: tuple[str, ...]
) -> None:
    (checkout.programs / "python3").unlink()
    code, out, err = checkout.run(*arguments)
    assert (code, err) == (0, "")
    assert "./dev demo" in out and "./dev test" in out


def test_no_python_is_one_sentence_with_the_remedy(checkout: Checkout) -> None:
    (checkout.programs / "python3").unlink()
    code, out, err = checkout.run("demo")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert (
        "needs Python 3.11 or newer, and found none that runs (tried python3 python3.14" in err
        and "apt-get install" in err
    )


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.10"])
def test_an_old_python_is_named(checkout: Checkout, version: str) -> None:
    code, out, err = checkout.run("demo", VERSION=version)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"found python3 is {version}" in err
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.14", "3.20", "4.0"])
def test_a_newer_python_is_taken(checkout: Checkout, version: str) -> None:
    assert checkout.run("demo", VERSION=version)[0] == 0


def test_a_stub_that_does_not_run_is_passed_over(checkout: Checkout) -> None:
    (checkout.programs / "python3").rename(checkout.programs / "python3.12")
    stub = checkout.programs / "python3"
    stub.write_text("#!/bin/sh\necho 'version manager: no such version' >&2\nexit 127\n")
    stub.chmod(0o755)
    assert checkout.run("demo")[0] == 0


def test_a_python_that_is_named_is_the_only_one_tried(checkout: Checkout, tmp_path: Path) -> None:
    named = tmp_path / "my python"
    code, _, err = checkout.run("demo", PARKDET_PYTHON=str(named))
    assert code == 1
    assert f"found none that runs (tried {named})" in err

    (checkout.programs / "python3").rename(named)
    assert checkout.run("demo", PARKDET_PYTHON=str(named))[0] == 0


def test_a_missing_venv_module_is_one_sentence_with_the_remedy(checkout: Checkout) -> None:
    code, out, err = checkout.run("demo", NO_VENV="1")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "python3 (3.11) lacks the modules venv and ensurepip" in err and "python3-venv" in err


def test_an_index_out_of_reach_is_told_and_nothing_counts_as_installed(checkout: Checkout) -> None:
    code, out, err = checkout.run("demo", PIP_SAYS="NewConnectionError('Failed to establish a connection')")
    assert (code, out) == (1, "")
    assert "pip cannot reach its package index" in err
    assert checkout.run("demo")[0] == 0
    assert checkout.installations() == 1


@pytest.mark.parametrize(
    ("said", "told"), [("OSError: No space left on device", "disk is full"), ("no matching wheel", "pip.log")]
)
def test_other_failures_of_pip(checkout: Checkout, said: str, told: str) -> None:
    code, _, err = checkout.run("demo", PIP_SAYS=said)
    assert code == 1
    assert told in err


def test_the_second_call_installs_nothing_and_works_from_anywhere(checkout: Checkout, tmp_path: Path) -> None:
    code, out, _ = checkout.run("train", "--data", "a b", cwd=tmp_path)
    assert (code, out) == (0, f"parkdet in {tmp_path}: train --data a b\n")

    assert checkout.run("train", "--data", "a b", cwd=tmp_path) == (0, out, "")
    assert checkout.installations() == 1


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints/cpu.txt"])
def test_a_change_of_what_is_wanted_installs_again(checkout: Checkout, name: str) -> None:
    checkout.run("demo")
    with (checkout.root / name).open("a") as file:
        file.write("# another line\n")
    assert checkout.run("demo")[0] == 0
    assert checkout.installations() == 2


def test_an_interrupted_installation_counts_as_none(checkout: Checkout) -> None:
    process = checkout.start("demo", PIP_SECONDS="30")
    _wait_for(checkout.record)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.endswith("dev: interrupted; the next call goes on\n")

    assert checkout.run("demo")[0] == 0
    assert checkout.installations() == 1


def test_an_installation_that_fails_halfway_leaves_nothing_that_counts_as_installed(checkout: Checkout) -> None:
    checkout.run("demo")
    project = checkout.root / "pyproject.toml"
    before = project.read_text()
    project.write_text(before + "# another line\n")
    assert checkout.run("demo", PIP_SAYS="no matching wheel")[0] == 1

    project.write_text(before)  # what was installed then is no longer what is there
    assert checkout.run("demo")[0] == 0
    assert checkout.installations() == 2


def test_two_calls_at_once_install_once(checkout: Checkout) -> None:
    first = checkout.start("demo", PIP_SECONDS="1")
    _wait_for(checkout.record)
    second = checkout.start("demo", PIP_SECONDS="1")
    outcomes = [process.communicate(timeout=60) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0]
    assert "another ./dev is installing; waiting" in outcomes[1][1]
    assert checkout.installations() == 1


def test_a_moved_environment_is_made_again(checkout: Checkout) -> None:
    checkout.run("demo")
    leftover = checkout.root / ".venv" / "leftover"
    leftover.touch()
    moved = checkout.root.rename(checkout.root.with_name("elsewhere"))
    code, _, err = Checkout(moved, checkout.programs, checkout.record).run("demo")
    assert code == 0
    assert f"making {moved}/.venv" in err
    assert not (moved / ".venv" / "leftover").exists()


def test_a_broken_environment_is_made_again(checkout: Checkout) -> None:
    checkout.run("demo")
    python = checkout.root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3.11")
    assert checkout.run("demo")[0] == 0
    assert checkout.installations() == 2


def test_what_each_word_starts(checkout: Checkout) -> None:
    checkout.run("demo")
    assert checkout.run("test", "-x")[1] == "-m pytest -m not slow and not bench and not gpu -x\n"
    assert checkout.run("test-gpu", "-x")[1] == "-m pytest -m gpu -x\n"
    assert checkout.run("benchmarks")[1] == "-m pytest -m bench -s\n"
    assert checkout.run("lint")[1] == "-m ruff check .\n-m ruff format --check .\n-m mypy\n"
    assert checkout.run("python", "-c", "print(6 * 7)")[1] == "42\n"


def test_where_there_is_a_gpu_its_tests_get_tensorrt(checkout: Checkout) -> None:
    checkout.run("demo")
    before = checkout.record.read_text()
    assert checkout.run("test-gpu") == (0, "-m pytest -m gpu\n", "")
    assert checkout.record.read_text() == before
    program = checkout.programs / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    code, out, err = checkout.run("test-gpu")
    assert (code, out) == (0, "-m pytest -m gpu\n")
    assert "installing TensorRT" in err
    assert checkout.record.read_text().splitlines()[-1].endswith("tensorrt-cu13>=10.16")
    code, out, err = checkout.run("test-gpu", PIP_SAYS="No matching distribution found for tensorrt-cu13-libs")
    assert (code, out) == (0, "-m pytest -m gpu\n")  # they run all the same, and say what they skip
    assert "pip failed" in err and "going on without" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_no_word_of_its_own_hides_a_command_of_parkdet(checkout: Checkout, command: str) -> None:
    checkout.run("doctor")
    assert checkout.run(command, "--help")[1].endswith(f": {command} --help\n")


def test_a_link_to_it_works(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(checkout.root / "dev")
    run = subprocess.run(
        [tmp_path / "link", "doctor"],
        env={"PATH": str(checkout.programs), "RECORD": str(checkout.record)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0
    assert run.stdout.endswith(": doctor\n")


def _wait_for(file: Path) -> None:
    for _ in range(600):
        if file.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{file} did not appear")
