from __future__ import annotations

import errno
import fcntl
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import polars as pl
import pytest

from parkdet.runtime.errors import GateError, ParkdetError, UsageError
from parkdet.submission import SubmissionFormat, check_submission, fit, write_submission
from parkdet.submission.cut import Fit
from parkdet.submission.findings import CheckReport

Table = Callable[..., pl.DataFrame]

IMAGES = dict.fromkeys(range(10_000, 10_100), (1920, 1080))
accept = partial(check_submission, image_ids=IMAGES, category_ids=range(1, 15), image_sizes=IMAGES, limit_bytes=10**9)


@pytest.fixture
def fitted(random_table: Table) -> Fit:
    return fit(random_table(1000, images=100), 50_000)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_empty_submission_is_a_file(tmp_path: Path, random_table: Table) -> None:
    report = write_submission(fit(random_table(0), 10), tmp_path / "s.json", accept)
    assert (tmp_path / "s.json").read_bytes() == b"[]"
    assert report.entry_count == 0


def test_the_file_is_the_computed_one_and_the_only_one(
    tmp_path: Path, fitted: Fit, naive_file: Callable[..., bytes]
) -> None:
    path = tmp_path / "s.json"
    report = write_submission(fitted, path, accept)
    assert path.read_bytes() == naive_file(fitted.kept)
    assert path.stat().st_size == fitted.size_bytes < 50_000
    assert report.entry_count == fitted.kept_count
    assert names(tmp_path) == ["s.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def test_what_a_killed_writer_left_goes_and_what_another_is_writing_stays(tmp_path: Path, fitted: Fit) -> None:
    left, writing, of_another = (
        tmp_path / f".{name}.tmp" for name in ("s[1].json.12ab", "s[1].json.34cd", "s1.json.56ef")
    )
    for path in (left, writing, of_another):
        path.write_bytes(b"[{")
    with writing.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_submission(fitted, tmp_path / "s[1].json", accept)
    assert sorted(names(tmp_path)) == sorted(["s[1].json", writing.name, of_another.name])


def test_while_it_is_written_it_is_not_taken_for_left_behind(tmp_path: Path, fitted: Fit) -> None:
    path = tmp_path / "s.json"

    def write_another(written: Path) -> CheckReport:
        if len(names(tmp_path)) == 1:  # the outer one's; the inner one sees both
            write_submission(fitted, path, write_another)
        return accept(written)

    write_submission(fitted, path, write_another)
    assert names(tmp_path) == ["s.json"]


def test_twice_is_equal_to_the_byte(tmp_path: Path, random_table: Table) -> None:
    for name in ("a.json", "b.json"):
        write_submission(fit(random_table(1000, images=100), 50_000), tmp_path / name, accept)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_what_is_checked_lies_on_the_disk_and_not_yet_under_the_name(tmp_path: Path, fitted: Fit) -> None:
    path = tmp_path / "s.json"
    path.write_text("old")
    seen: list[tuple[bytes, str, Path]] = []

    def look(written: Path) -> CheckReport:
        seen.append((written.read_bytes(), path.read_text(), written.parent))
        return accept(written)

    write_submission(fitted, path, look)
    assert seen == [(path.read_bytes(), "old", tmp_path)]


def test_a_file_that_a_judge_would_refuse_is_not_kept(tmp_path: Path, fitted: Fit) -> None:
    path = tmp_path / "s.json"
    path.write_text("old")
    refuse = partial(
        check_submission, image_ids=[10_000], category_ids=range(1, 15), image_sizes=IMAGES, limit_bytes=10**9
    )
    with pytest.raises(GateError, match="image not in the test set"):
        write_submission(fitted, path, refuse)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["s.json"]


@pytest.mark.parametrize("room", [0, 100, 30_000])
def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path: Path, fitted: Fit, room: int) -> None:
    path = tmp_path / "s.json"
    path.write_text("old")
    with files_limited_to(room), pytest.raises(OSError, match=r"s\.json"):
        write_submission(fitted, path, accept)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["s.json"]


def test_a_folder_that_refuses_is_told_under_the_users_name(
    tmp_path: Path, fitted: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError) as caught:
        write_submission(fitted, tmp_path / "s.json", accept)
    assert caught.value.filename == str(tmp_path / "s.json")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_the_old_file_and_no_litter(
    tmp_path: Path, fitted: Fit, interruption: type[BaseException]
) -> None:
    def stop(written: Path) -> CheckReport:
        assert written.exists()
        raise interruption

    path = tmp_path / "s.json"
    path.write_text("old")
    with pytest.raises(interruption):
        write_submission(fitted, path, stop)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["s.json"]


def test_a_size_that_is_not_the_computed_one_is_never_kept(
    tmp_path: Path, fitted: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = SubmissionFormat.file_chunks

    def longer(form: SubmissionFormat, table: pl.DataFrame) -> Iterator[bytes]:
        yield from lines(form, table)
        yield b"\n"

    monkeypatch.setattr(SubmissionFormat, "file_chunks", longer)
    with pytest.raises(ParkdetError, match="were written where"):
        write_submission(fitted, tmp_path / "s.json", accept)
    assert names(tmp_path) == []


def test_a_link_keeps_pointing_at_the_file(tmp_path: Path, fitted: Fit) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "s.json")
    write_submission(fitted, link, accept)
    assert link.is_symlink()
    assert (tmp_path / "real" / "s.json").stat().st_size == fitted.size_bytes


def test_places_where_no_file_can_be_are_the_users_mistake(tmp_path: Path, fitted: Fit) -> None:
    with pytest.raises(UsageError, match="not a regular file"):
        write_submission(fitted, tmp_path, accept)
    with pytest.raises(UsageError, match="no such folder"):
        write_submission(fitted, tmp_path / "none" / "s.json", accept)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a regular file"):
        write_submission(fitted, tmp_path / "pipe", accept)
