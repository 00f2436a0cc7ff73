"""The root command: what it lists, how it fails, and which exit code each failure has."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click
import pytest

from parkdet.cli import main as root
from parkdet.cli.failures import EXTRA_OF_MODULE, explain
from parkdet.runtime.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    GateError,
    Interrupted,
    InUseError,
    ParkdetError,
    UsageError,
)

if TYPE_CHECKING:
    from tests.conftest import RunCli

Probe = Callable[[Callable[[], Any]], None]


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    """Installs a function as the command `parkdet probe`."""

    def install(function: Callable[[], Any]) -> None:
        @click.command()
        @click.option("--size", type=int, default=1)
        def command(size: int) -> Any:  # noqa: ARG001
            return function()

        monkeypatch.setitem(sys.modules, "probe_module", SimpleNamespace(probe=command))
        monkeypatch.setitem(root.parkdet.table, "probe", ("probe_module:probe", "A probe."))
        monkeypatch.setitem(root.parkdet.commands, "probe", click.Command("probe"))

    return install


def raising(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands_in_the_order_of_the_pipeline(run_cli: RunCli, arguments: tuple[str, ...]) -> None:
    code, out, err = run_cli(*arguments)

    assert (code, err) == (0, "")
    # At the start of a line: a word such as report may stand in what another command does.
    places = [re.search(rf"^\W*{name} ", out, re.MULTILINE) for name in root.COMMANDS]
    starts = [place.start() for place in places if place is not None]
    assert len(starts) == len(root.COMMANDS)
    assert starts == sorted(starts)


@pytest.mark.parametrize("name", root.COMMANDS)
def test_every_command_of_the_table_exists_and_explains_itself(run_cli: RunCli, name: str) -> None:
    module, attribute = root.COMMANDS[name][0].split(":")
    assert isinstance(getattr(import_module(module), attribute), click.Command)

    code, out, err = run_cli(name, "--help")
    assert (code, err) == (0, "")
    assert f"parkdet {name}" in out
    assert "--debug" in out


def test_version(run_cli: RunCli) -> None:
    code, out, err = run_cli("--version")
    assert (code, err) == (0, "")
    assert out.startswith("parkdet ") and out.split()[1][0].isdigit()


def test_a_mistyped_command_is_answered_with_the_nearest(run_cli: RunCli) -> None:
    code, out, err = run_cli("tarin")
    assert (code, out) == (2, "")
    assert "tarin" in err and "'train'" in err


def test_a_mistyped_option_is_answered_with_the_nearest(run_cli: RunCli, probe: Probe) -> None:
    probe(lambda: None)
    code, out, err = run_cli("probe", "--sise", "3")
    assert (code, out) == (2, "")
    assert "--sise" in err and "--size" in err and "parkdet probe --help" in err


@pytest.mark.parametrize(
    ("arguments", "named"), [(["--data", ""], "--data"), (["--data="], "--data"), ([""], "an argument")]
)
def test_an_empty_value_is_not_the_folder_one_happens_to_be_in(
    run_cli: RunCli, probe: Probe, arguments: list[str], named: str
) -> None:
    probe(lambda: pytest.fail("the command ran"))
    code, out, err = run_cli("probe", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {named}: its value is empty")


def test_a_setting_may_be_emptied(run_cli: RunCli, tmp_path: Path) -> None:
    # `weights=` is a setting's business, and no option.
    code, _, err = run_cli("train", "--data", tmp_path / "none", "weights=")
    assert code == 2
    assert "its value is empty" not in err


def test_a_command_that_returns_nothing_is_done_and_an_int_is_the_exit_code(run_cli: RunCli, probe: Probe) -> None:
    probe(lambda: None)
    assert run_cli("probe") == (0, "", "")
    probe(lambda: 1)
    assert run_cli("probe") == (1, "", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("a.json: no images"), 1),
        (ArtifactError("a.onnx: damaged"), 1),
        (InUseError("runs: in use"), 1),
        (UsageError("no: does not exist"), 2),
        (ConfigError("a.yaml:1:1 x: unknown key\na.yaml:2:1 y: unknown key"), 2),
        (GateError("over the limit"), 3),
    ],
)
def test_our_errors_are_one_message_with_their_exit_code(
    run_cli: RunCli, probe: Probe, error: ParkdetError, code: int
) -> None:
    probe(raising(error))
    assert run_cli("probe") == (code, "", f"error: {error}\n")


def test_interruptions_exit_with_130_and_one_line(run_cli: RunCli, probe: Probe) -> None:
    probe(raising(KeyboardInterrupt()))
    assert run_cli("probe") == (130, "", "interrupted\n")
    probe(raising(click.Abort()))
    assert run_cli("probe") == (130, "", "interrupted\n")
    probe(raising(Interrupted("last.pt saved; --resume goes on")))
    assert run_cli("probe") == (130, "", "interrupted: last.pt saved; --resume goes on\n")


@pytest.mark.parametrize("arguments", [("--debug", "probe"), ("probe", "--debug")])
def test_debug_shows_the_traceback_wherever_it_stands(
    run_cli: RunCli, probe: Probe, arguments: tuple[str, ...]
) -> None:
    probe(raising(DataError("a.json: no images")))
    code, _, err = run_cli(*arguments)
    assert code == 1
    assert err.startswith("Traceback") and err.endswith("error: a.json: no images\n")


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_debug_by_environment(
    run_cli: RunCli, probe: Probe, monkeypatch: pytest.MonkeyPatch, value: str, shown: bool
) -> None:
    monkeypatch.setenv("PARKDET_DEBUG", value)
    probe(raising(DataError("a.json: no images")))
    assert ("Traceback" in run_cli("probe").err) is shown


def test_an_unexpected_error_is_two_lines_that_ask_for_a_report(run_cli: RunCli, probe: Probe) -> None:
    probe(raising(RuntimeError("shape\n   mismatch")))
    code, out, err = run_cli("probe")
    assert (code, out) == (1, "")
    assert err == (
        "error: unexpected RuntimeError: shape mismatch\nrun again with --debug for the traceback; please report it\n"
    )


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota")])
def test_a_full_disk_names_the_file_even_behind_another_error(number: int, words: str) -> None:
    full = OSError(number, os.strerror(number), "runs/best.pt")
    wrapped = RuntimeError("writer failed")
    wrapped.__cause__ = full
    for error in (full, wrapped):
        message, code = explain(error)
        assert code == 1
        assert message.startswith("error: runs/best.pt: ") and words in message and "run the same" in message


def test_a_full_disk_without_a_name_is_told_too() -> None:
    assert explain(OSError(errno.ENOSPC, "No space left on device"))[0].startswith("error: the disk is full")


def test_a_rename_that_fails_names_its_target() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "runs/.best.tmp", None, "runs/best.pt")
    assert explain(error)[0].startswith("error: runs/best.pt: ")


@pytest.mark.parametrize("kind", [PermissionError, IsADirectoryError, FileNotFoundError, NotADirectoryError])
def test_errors_of_the_file_system_start_with_the_path(kind: type[OSError], tmp_path: Path) -> None:
    number = {
        PermissionError: errno.EACCES,
        IsADirectoryError: errno.EISDIR,
        FileNotFoundError: errno.ENOENT,
        NotADirectoryError: errno.ENOTDIR,
    }[kind]
    message, code = explain(kind(number, os.strerror(number), str(tmp_path)))
    assert code == 1
    assert message.startswith(f"error: {tmp_path}: {os.strerror(number)} (")


@pytest.mark.parametrize(("module", "extra"), EXTRA_OF_MODULE.items())
def test_an_absent_library_names_its_extra(module: str, extra: str) -> None:
    error = ModuleNotFoundError(f"No module named '{module}'", name=module)
    assert explain(error) == (
        f"error: this command needs {module}, which is not installed; run: pip install 'parkdet[{extra}]'",
        1,
    )


def test_a_library_that_does_not_load_is_not_called_absent() -> None:
    message, _ = explain(ImportError("libgomp.so.1: cannot open shared object file", name="torch._C"))
    assert "torch is installed but does not load (libgomp.so.1" in message


def test_an_absent_module_of_ours_is_a_bug() -> None:
    error = ModuleNotFoundError("No module named 'parkdet.nothing'", name="parkdet.nothing")
    assert explain(error)[0].startswith("error: unexpected ModuleNotFoundError")


def test_the_table_of_extras_is_that_of_pyproject(repository: Path) -> None:
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    declared = {
        (requirement.split(">")[0].split("=")[0].strip(), extra)
        for extra in ("train", "cpu", "report")
        for requirement in extras[extra]
    }
    assert declared == set(EXTRA_OF_MODULE.items())


@pytest.mark.parametrize("error", [MemoryError(), type("OutOfMemoryError", (RuntimeError,), {})("2 GiB")])
def test_out_of_memory_says_what_to_lower(error: BaseException) -> None:
    message, code = explain(error)
    assert code == 1
    assert message.startswith("error: out of memory") and "--batch-size" in message


def test_help_imports_no_library_and_no_subcommand() -> None:
    script = textwrap.dedent("""
        import sys
        from parkdet.cli.main import main
        main(["--help"])
        print(*sys.modules, file=sys.stderr)
    """)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stderr.split()}
    assert "click" in loaded
    assert not loaded & {
        "torch",
        "numpy",
        "cv2",
        "polars",
        "pyarrow",
        "pydantic",
        "yaml",
        "openvino",
        "hotcoco",
    }
    assert not set(run.stderr.split()) & {place.split(":")[0] for place, _ in root.COMMANDS.values()}


def _process(script: str, **streams: Any) -> subprocess.Popen[str]:
    """`parkdet probe` in a process of its own, where `probe` runs the script."""
    program = textwrap.dedent("""
        import os, sys, time, types
        import click
        from parkdet.cli import main as root
        @click.command()
        def probe():
            exec(os.environ["SCRIPT"], {"os": os, "sys": sys, "time": time})
        sys.modules["probe_module"] = types.SimpleNamespace(probe=probe)
        root.parkdet.table["probe"] = ("probe_module:probe", "")
        root.parkdet.commands["probe"] = click.Command("probe")
        sys.exit(root.main(["probe"]))
    """)
    return subprocess.Popen(
        [sys.executable, "-c", program],
        text=True,
        env={**os.environ, "SCRIPT": textwrap.dedent(script)},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_command_clean_up_and_exits_with_130(number: signal.Signals) -> None:
    process = _process("""
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("saved", flush=True)
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "saved\n", "interrupted\n")


def test_a_forked_worker_that_is_terminated_ends_quietly() -> None:
    process = _process("""
        import signal
        started, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(tell, b"x")  # a signal that comes earlier is lost: Python clears what is pending
            time.sleep(60)
            os._exit(0)
        os.read(started, 1)
        os.kill(child, signal.SIGTERM)
        print(os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM)
    """)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "True\n", "")


@pytest.mark.parametrize("flush", ["True", "False"])
def test_a_reader_that_leaves_is_no_error(flush: str) -> None:
    process = _process(f"""
        time.sleep(0.3)
        for number in range(20_000):
            print(number, flush={flush})
    """)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), err) == (1, "")


@pytest.mark.parametrize(("closed", "arguments", "code"), [(1, "--version", 0), (1, "nosuch", 2), (2, "nosuch", 2)])
def test_a_stream_that_is_closed_is_no_error(closed: int, arguments: str, code: int) -> None:
    program = f"import sys; from parkdet.cli.main import main; sys.exit(main([{arguments!r}]))"
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}>&-', sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stdout + done.stderr


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    # Libraries write messages to number 2 whatever is open there.
    path = tmp_path / "numbers"
    program = (
        "import os, sys; from parkdet.cli import main as root; root._invoke = lambda words: "
        "os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY) > 2 and os.write(2, b'noise') and 7; sys.exit(root.main())"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" "$2" <&- >&- 2>&-', sys.executable, program, str(path)]
    assert subprocess.run(command, check=False).returncode == 7
    assert path.read_bytes() == b""


def test_a_broken_pipe_of_our_own_is_an_error() -> None:
    process = _process("""
        reader, writer = os.pipe()
        os.close(reader)
        os.write(writer, b"x")
    """)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "BrokenPipeError" in err


def test_a_name_that_is_not_text_does_not_end_a_report() -> None:
    process = _process("""
        print(os.fsdecode(bytes([255])), chr(0xC8FC))
    """)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out == "\\udcff \N{HANGUL SYLLABLE JU}\n"


@pytest.mark.parametrize(("no_color", "colored"), [("", True), ("1", False)])
def test_errors_are_coloured_on_terminals_unless_no_color_is_set(
    no_color: str, colored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    monkeypatch.setenv("NO_COLOR", no_color)
    leader, follower = pty.openpty()
    process = _process("raise MemoryError", stderr=follower)
    os.close(follower)
    assert process.wait(60) == 1
    text = os.read(leader, 4096).decode()
    os.close(leader)
    assert process.stdout is not None
    process.stdout.close()
    assert "out of memory" in text
    assert ("\x1b[" in text) is colored


@pytest.mark.parametrize("option", ["--conf-thres", "--iou-thres"])
def test_a_threshold_that_is_no_number_is_a_usage_error(run_cli: RunCli, tmp_path: Path, option: str) -> None:
    code, _, err = run_cli("val", "--weights", tmp_path / "w.pt", "--data", tmp_path, option, "nan")
    assert code == 2
    assert err.startswith(f"error: {option}: must be from 0 to 1")


@pytest.mark.parametrize("command", ["train", "val", "infer"])
def test_a_size_that_no_memory_holds_is_refused_before_anything_is_read(
    run_cli: RunCli, tmp_path: Path, command: str
) -> None:
    code, _, err = run_cli(command, "--weights", tmp_path / "w", "--data", tmp_path, "--imgsz", "99999999")
    assert code == 2
    assert "'--imgsz'" in err and "16384" in err
