# SPDX-License-Identifier: Apache-2.0
"""Entries are there whole or not at all, whatever happens to those who write them."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monai_patchqueue.io import entries
from monai_patchqueue.io.entries import DamagedEntry, EntryFolder, NoRoom
from tests.processes import child, in_children

FILES = {"image.b2nd": os.urandom(200_000), "label.b2nd": b"label" * 1000}


def everything(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_an_entry_comes_back_as_it_was_written(tmp_path: Path) -> None:
    folder = EntryFolder(tmp_path / "made" / "when" / "needed")
    assert folder.names() == []
    size = folder.write("a", {"keys": [1, None]}, FILES)
    assert folder.names() == ["a"]
    assert folder.read("a") == {"keys": [1, None]}
    assert folder.path("a", "label.b2nd").read_bytes() == FILES["label.b2nd"]
    assert size == folder.nbytes("a") == sum(path.stat().st_size for path in everything(tmp_path))
    folder.remove("a")
    folder.remove("a")
    assert everything(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        folder.read("a")


def write_and_die(folder: EntryFolder, step: int) -> None:
    """Write an entry, and be killed at one of the steps of it that touch the disk."""
    steps = 0

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    os.fsync, os.rename, os.mkdir = dying(os.fsync), dying(os.rename), dying(os.mkdir)
    folder.write("a", {}, FILES)


@pytest.mark.parametrize("step", range(1, 10))
def test_a_writer_that_is_killed_leaves_no_entry_or_a_whole_one(tmp_path: Path, step: int) -> None:
    folder = EntryFolder(tmp_path)
    folder.write("other", {}, {"file": b"1"})
    with child(write_and_die, folder, step) as writer:
        writer.join(60)
    assert writer.exitcode in (0, -signal.SIGKILL)
    if "a" in folder:
        assert folder.damaged("a") == []
    else:
        assert folder.names() == ["other"]
        folder.remove_leftovers()
        folder.write("a", {}, FILES)
    assert folder.names() == ["a", "other"]
    assert not list(tmp_path.glob(".*"))


def test_leftovers_of_writers_that_live_are_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / f".unfinished-{entries.socket.gethostname()}-{os.getpid()}-{'0' * 32}"
    elsewhere = tmp_path / f".unfinished-another-host-1-{'0' * 32}"
    old = tmp_path / f".unfinished-another-host-2-{'0' * 32}"
    reused = tmp_path / f".unfinished-{entries.socket.gethostname()}-{os.getpid()}-{'1' * 32}"
    for path in (mine, elsewhere, old, reused):
        path.mkdir()
        (path / "voxels").write_bytes(b"12345")
    long_ago = time.time() - 10 * 24 * 3600
    for path in (old, reused):  # the process that has this number now is younger than the folder
        os.utime(path, (long_ago, long_ago))
    assert EntryFolder(tmp_path).remove_leftovers() == 10
    assert set(tmp_path.iterdir()) == {mine, elsewhere}


def test_of_several_writers_one_wins_and_none_fails(tmp_path: Path) -> None:
    folder = EntryFolder(tmp_path / "new")

    def write_many() -> bool:
        for number in range(12):
            folder.write(f"entry-{number}", number, FILES)
            assert folder.damaged(f"entry-{number}") == []
        return True

    in_children([write_many] * 4)
    assert folder.names() == sorted(f"entry-{number}" for number in range(12))
    assert [folder.read(name) for name in folder.names()] == [int(name[6:]) for name in folder.names()]
    assert not list(folder.root.glob(".*"))


def test_a_full_disk_leaves_nothing_of_the_entry(tmp_path: Path) -> None:
    folder = EntryFolder(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(NoRoom, match="bytes are needed") as raised:
            folder.write("a", {}, FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.needed > 200_000
    assert list(tmp_path.iterdir()) == []
    folder.write("a", {}, FILES)


@pytest.mark.parametrize("file", [*FILES, "entry.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_named(tmp_path: Path, file: str, damage: str) -> None:
    folder = EntryFolder(tmp_path)
    folder.write("a", {"age": 40}, FILES)
    path = folder.path("a", file)
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert folder.damaged("a") == [path]
    if file == "entry.json":
        with pytest.raises(FileNotFoundError if damage == "remove" else DamagedEntry, match=r"entry\.json"):
            folder.read("a")
