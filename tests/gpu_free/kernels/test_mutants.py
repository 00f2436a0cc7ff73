"""The kernels' mutants: that the list of survivors is about the sources as they are, and some found out."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from click.testing import CliRunner

from tests.gpu_free.kernels.mutants import SURVIVORS, identity, known_survivors, main
from tests.gpu_free.kernels.mutation import FILES, OPERATORS, blanked, mutants
from tests.gpu_free.kernels.simulation import KERNELS, ROOT, compiler


def test_every_operator_applies_somewhere() -> None:
    assert {mutant.operator for mutant in mutants(KERNELS)} == {name for name, _ in OPERATORS}


def test_blanking_moves_nothing() -> None:
    for file in FILES:
        text = (KERNELS / file).read_text()
        assert len(blanked(text)) == len(text)
        assert "//" not in blanked(text)


def test_every_listed_survivor_is_a_mutant_of_these_sources() -> None:
    texts = {file: (KERNELS / file).read_text() for file in FILES}
    there = {identity(mutant, texts[mutant.file]) for mutant in mutants(KERNELS)}
    stale = set(known_survivors()) - there
    assert not stale, f"{SURVIVORS} lists what is no mutant (any more)"


needs_compiler = pytest.mark.skipif(compiler() is None, reason="no g++ (or what CXX names)")


def commits_seed() -> str:
    """PARKDET_MUTANT_SEED, or the commit's: each tries other mutants, and fails again when it is run again."""
    if asked := os.environ.get("PARKDET_MUTANT_SEED"):
        return asked
    if shutil.which("git") is None:
        return "0"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return str(int(head.stdout[:8], 16)) if head.returncode == 0 else "0"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@needs_compiler
def test_a_sample_of_all_mutants_is_found_out() -> None:
    done = CliRunner().invoke(main, ["--sample", "60", "--seed", commits_seed()])
    print(done.output)  # how to repeat it
    assert done.exit_code == 0, done.output


@pytest.mark.slow
@pytest.mark.timeout(1200)
@needs_compiler
def test_every_barrier_and_every_atomic_is_needed() -> None:
    """All mutants take long (CONTRIBUTING.md has the command); these are what no result need show on one processor."""
    done = CliRunner().invoke(main, ["--only", "barrier removed|atomic made plain"])
    assert done.exit_code == 0, done.output
    assert "found out by thread" in done.output
