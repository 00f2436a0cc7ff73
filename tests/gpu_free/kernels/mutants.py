"""Does any test see it when a kernel is wrong? `./dev python -m tests.gpu_free.kernels.mutants` asks of every mutant.

Each is compiled for the CPU and run over the cases of cases.py; then, if it gave the right results, again with the
address and undefined-behaviour sanitizers, and with the thread sanitizer, which sees a missing barrier whatever came
of it. A mutant that passes all must stand in survivors.toml with the proof that it is no error. Most take half a second
of a core, those that the results do not tell some 12 s; of the 3,977 of them, about 300.
"""

from __future__ import annotations

import math
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from tests.gpu_free.kernels.case_file import write_cases
from tests.gpu_free.kernels.cases import (
    LetterboxCase,
    NmsCase,
    SigmoidCase,
    all_cases,
    short_cases,
    thread_cases,
)
from tests.gpu_free.kernels.mutation import FILES, Mutant, mutants
from tests.gpu_free.kernels.simulation import HERE, KERNELS, CompileError, case_runner, run_cases

SURVIVORS = HERE / "survivors.toml"
SANITIZED = ("", "address", "thread")
"""What the kernels are compiled with, in the order in which mutants meet it."""
PATIENCE = 6
"""A mutant hangs when it takes so many times the CPU time of the kernels as they are, on this machine, at this hour."""
LEAST_SECONDS = 8


Change = tuple[str, str, str, str]
"""File, function, line, changed line: what a mutant is known by when the sources move. A line may be there twice."""
_FUNCTION = re.compile(r"^__(?:device|global)__ [^{;]*?\b(\w+)\([^()]*\) \{", re.MULTILINE)


def known_survivors() -> dict[Change, str]:
    """The proof that a change is none."""
    known = {}
    for group in tomllib.loads(SURVIVORS.read_text(encoding="utf-8")).get("proof", []):
        for function, line, becomes in group["changes"]:
            known[group["file"], function, line, becomes] = group["because"]
    return known


def identity(mutant: Mutant, text: str) -> Change:
    """What the mutant is known by in survivors.toml."""
    above = _FUNCTION.findall(text, 0, mutant.start)
    return mutant.file, above[-1] if above else "", mutant.before(text), mutant.after(text)


class Laboratory:
    """The cases, written once, and what they say of a mutant."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.texts = {file: (KERNELS / file).read_text() for file in FILES}
        self.limits: dict[tuple[str, str], int] = {}
        """CPU seconds by file and sanitizer."""
        self.cases: dict[tuple[str, str], Path] = {}
        kinds = {"nms.cuh": NmsCase | SigmoidCase, "letterbox.cuh": LetterboxCase}
        for sanitizer, cases in (("", all_cases()), ("address", short_cases()), ("thread", [*thread_cases()])):
            for file, kind in kinds.items():
                self.cases[file, sanitizer] = folder / f"{file}-{sanitizer}"
                write_cases(self.cases[file, sanitizer], [case for case in cases if isinstance(case, kind)])

    def set_limit(self, file: str, sanitizer: str) -> None:
        """Measure the kernels as they are. ClickException when their own cases say that something is wrong."""
        runner = case_runner(sanitizer=sanitizer)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        if found := run_cases(runner, self.cases[file, sanitizer], 600):
            raise click.ClickException(
                f"{file} as it is fails ({sanitizer or 'cases'}: {found}): mutants would say nothing"
            )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.limits[file, sanitizer] = max(LEAST_SECONDS, math.ceil(PATIENCE * seconds))

    def judge(self, mutant: Mutant, sanitizer: str) -> str:
        """How the mutant was found out; `not compiled`; or nothing, if it was not."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            kernels = Path(name)
            for source in [*KERNELS.glob("*.h"), *KERNELS.glob("*.cuh")]:
                shutil.copy(source, kernels)
            (kernels / mutant.file).write_text(mutant.apply(self.texts[mutant.file]))
            try:
                runner = case_runner(kernels, sanitizer)
            except CompileError:
                return "not compiled"
            try:
                found = run_cases(runner, self.cases[mutant.file, sanitizer], self.limits[mutant.file, sanitizer])
            finally:
                runner.unlink(missing_ok=True)
        return f"{sanitizer or 'cases'}: {found.splitlines()[0]}" if found else ""

    def verdicts(self, chosen: Sequence[Mutant], sanitize: bool, jobs: int) -> Iterator[tuple[Mutant, str]]:
        """What became of each, those first that the results tell."""
        for sanitizer in SANITIZED if sanitize else SANITIZED[:1]:
            for file in sorted({mutant.file for mutant in chosen}):
                self.set_limit(file, sanitizer)
            survivors = []
            with ThreadPoolExecutor(jobs) as pool:
                found = pool.map(self.judge, chosen, [sanitizer] * len(chosen))
                for mutant, verdict in zip(chosen, found, strict=True):
                    if verdict:
                        yield mutant, verdict
                    else:
                        survivors.append(mutant)
            chosen = survivors
        yield from ((mutant, "") for mutant in chosen)


@click.command()
@click.option("--sample", type=click.IntRange(1), help="Only so many, drawn at random.")
@click.option("--seed", default=0, show_default=True, help="Of the draw.")
@click.option("--only", default="", help="Only those whose 'file operator: line => changed line' matches this.")
@click.option("--jobs", default=1, show_default=True, help="How many at a time.")
@click.option("--sanitize/--no-sanitize", default=True, help="Whether survivors meet the sanitizers.")
@click.option("--report", type=click.Path(path_type=Path), help="Where to write what became of each.")
def main(sample: int | None, seed: int, only: str, jobs: int, sanitize: bool, report: Path | None) -> None:
    """Make mutants of the kernels and see that each is found out."""
    started, known = time.monotonic(), known_survivors()
    with tempfile.TemporaryDirectory() as name:
        laboratory = Laboratory(Path(name))

        def describe(mutant: Mutant) -> str:
            text = laboratory.texts[mutant.file]
            place = f"{mutant.file}:{mutant.line_number(text)} {mutant.operator}"
            return f"{place}: {mutant.before(text)} => {mutant.after(text)}"

        chosen = [mutant for mutant in mutants(KERNELS) if re.search(only, describe(mutant))]
        if sample is not None:
            click.echo(f"drawn with --sample {sample} --seed {seed}")
            chosen = random.Random(seed).sample(chosen, min(sample, len(chosen)))
        tally: Counter[str] = Counter()
        lines: list[str] = []
        wrong: list[Mutant] = []
        for mutant, found in laboratory.verdicts(chosen, sanitize, jobs):
            listed = identity(mutant, laboratory.texts[mutant.file]) in known
            problem = ""
            if found == "not compiled":
                tally["no mutant: it does not compile"] += 1
            elif found and listed:
                problem = f"found out ({found}), but listed as no error"
            elif found:
                tally[f"found out by {found.split(':')[0]}"] += 1
            elif listed:
                tally["no error, as proven in survivors.toml"] += 1
            else:
                problem = "NOT FOUND OUT"
            if problem:
                wrong.append(mutant)
                click.echo(f"{problem}: {describe(mutant)}")
            lines.append(f"{found or 'survived'} | {describe(mutant)}")
            if len(lines) % 100 == 0:
                click.echo(f"{len(lines)} of {len(chosen)}, {time.monotonic() - started:.0f} s", err=True)
    if report is not None:
        report.write_text("\n".join(lines) + "\n")
    for what, count in sorted(tally.items()):
        click.echo(f"{count:5} {what}")
    click.echo(f"{len(wrong):5} to look into; {len(chosen)} mutants in {time.monotonic() - started:.0f} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
