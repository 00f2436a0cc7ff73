"""The command `parkdet`: the table of its subcommands, and what surrounds every one of them."""

from __future__ import annotations

import copy
import os
import re
import select
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from io import TextIOWrapper
from types import FrameType
from typing import Any

import click
import rich_click

from parkdet.cli.failures import explain
from parkdet.runtime.errors import EXIT_DONE, EXIT_FAILED, UsageError

COMMANDS = {
    "prepare": ("parkdet.train.prepare_cli:prepare", "Check the data set, report what is wrong, split it."),
    "train": ("parkdet.train.cli:train", "Train a detector on a data set."),
    "val": ("parkdet.train.cli:val", "Measure a checkpoint on the validation images."),
    "export": ("parkdet.export.cli:export", "Turn a checkpoint into ONNX, and check that they agree."),
    "infer": ("parkdet.cli.infer:infer", "Detect in the test images; a second run does what is missing."),
    "bench": ("parkdet.runtime.bench_cli:bench", "Measure a model: speed by stage, memory, will it be in time."),
    "submit": ("parkdet.submission.cli:submit", "Write the submission file, under its limit of bytes."),
    "report": ("parkdet.cli.report:report", "Show a run in one HTML file, and its submission as tables."),
    "doctor": ("parkdet.cli.doctor:doctor", "Look at this machine and installation for known problems."),
    "demo": ("parkdet.cli.demo:demo", "Draw parking lots and run the whole pipeline on them."),
}
"""Name -> where the command is defined, and its line in `parkdet --help`, in the order of the pipeline."""


def _debug_option() -> click.Option:
    # Declared so that it is accepted and listed; `main` reads it from the arguments, because the error
    # that it is for may come before or during parsing.
    return rich_click.RichOption(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error.")


class LazyGroup(rich_click.RichGroup):
    """A group that lists its subcommands from a table and imports only the one that is invoked."""

    def __init__(self, *args: Any, table: dict[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table
        for name, (_, line) in table.items():
            self.add_command(rich_click.RichCommand(name=name, help=line))  # a placeholder, for lists

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.table)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, placeholder, rest = super().resolve_command(ctx, args)
        if name is None or placeholder is None:
            return name, placeholder, rest
        module, _, attribute = self.table[name][0].partition(":")
        return name, _dressed(getattr(import_module(module), attribute)), rest


def _dressed(command: click.Command) -> click.Command:
    """The command with `--debug` and with the root's look; the module that defines it needs only click."""
    params = [*command.params, _debug_option()]
    if type(command) is not click.Command:
        dressed = copy.copy(command)
        dressed.params = params
        return dressed
    return rich_click.RichCommand(
        name=command.name,
        callback=command.callback,
        params=params,
        help=command.help,
        epilog=command.epilog,
        short_help=command.short_help,
        context_settings=command.context_settings,
        no_args_is_help=command.no_args_is_help,
    )


@click.group(
    "parkdet",
    cls=LazyGroup,
    table=COMMANDS,
    params=[_debug_option()],
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 usage or config, 3 a gate refused, 130 interrupted.",
)
@click.version_option(package_name="parkdet", message="%(prog)s %(version)s")
def parkdet() -> None:
    """Parking-lot object detection: from a data folder to a submission file, and to a detector in use."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `parkdet` with these arguments (default: the process's own) and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "_PARKDET_COMPLETE" in os.environ:  # the shell asks for completions; this exits
        parkdet.main(words, prog_name="parkdet")
    debug = "--debug" in words or os.environ.get("PARKDET_DEBUG", "0") not in ("", "0")
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a file name that is not text must not end a report
            stream.reconfigure(errors="backslashreplace")
    try:
        with _termination_interrupts():
            code = _invoke(words or ["--help"])
            sys.stdout.flush()
            return code
    except Exception as error:
        return _report(error, debug)
    except KeyboardInterrupt as error:
        return _report(error, debug)


def _open_closed_streams() -> None:
    """After `>&-` or `2>&-`: what is written goes nowhere, not into the next file that gets the free number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - open as long as the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _require_values(words: list[str]) -> None:
    """UsageError for `--data ""` and `--data=`: as a path it would be the folder one happens to be in."""
    for before, word in zip(["", *words], words, strict=False):
        if not word or re.fullmatch(r"--[a-z-]+=", word):
            option = word.rstrip("=") or (before if before.startswith("-") else "")
            raise UsageError(
                f"{option or 'an argument'}: its value is empty; give one (is a variable of the shell not set?)"
            )


def _invoke(words: list[str]) -> int:
    _require_values(words)
    try:
        with parkdet.make_context("parkdet", words) as context:
            result = parkdet.invoke(context)
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    return result if isinstance(result, int) else EXIT_DONE


def _report(error: BaseException, debug: bool) -> int:
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        return EXIT_FAILED
    message, code = explain(error)
    color = False if os.environ.get("NO_COLOR") else None  # None: on terminals
    head, mark, tail = message.partition("error:")
    if mark and not head:
        message = click.style(mark, fg="red", bold=True) + tail
    try:
        with suppress(OSError, ValueError):  # the results before the error, where both go to one terminal
            sys.stdout.flush()
        if debug:
            traceback.print_exception(error)
        if isinstance(error, KeyboardInterrupt) and sys.stderr.isatty():
            click.echo(err=True)  # ends the line on which the terminal shows ^C
        click.echo(message, err=True, color=color)
    except BrokenPipeError:
        _reader_is_gone()
    return code


def _reader_is_gone() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads; what is left to write goes nowhere.

    A pipe to one of our own worker processes breaks with the same exception, and that is an error.
    """
    gone = False
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a stream that is closed or no file has no reader to lose
            number = stream.fileno()
            state = select.poll()
            state.register(number, 0)
            if any(event & select.POLLERR for _, event in state.poll(0)):
                gone = True
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
    return gone


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """While inside, SIGTERM raises KeyboardInterrupt, so that what saves on Ctrl-C saves then too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker inherits this handler, and is to end quietly
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
