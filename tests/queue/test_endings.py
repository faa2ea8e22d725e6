# SPDX-License-Identifier: Apache-2.0
"""However the main process ends, no worker, no shared memory and no file outlives it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.pipelines import Patches, append_line, lines, make_loader
from tests.processes import child, is_alive, shared_memory_files, wait_for

pytestmark = pytest.mark.timeout(60)

WITHIN = 5.0  # seconds


class Slow:
    """Takes seconds with all volumes but the first few, and says who is at it."""

    def __init__(self, folder: Path, seconds: float = 60) -> None:
        self.folder = folder
        self.seconds = seconds

    def __call__(self, volume: int) -> None:
        append_line(self.folder / ("busy" if volume >= 4 else "loading"), os.getpid())
        time.sleep(self.seconds if volume >= 4 else 0)


def consume(folder: Path, num_workers: int, arguments: dict[str, Any]) -> None:
    """What the process that is to end does: waits for a batch, having got some."""
    loader = make_loader(Patches([4] * 20, fault=Slow(folder)), num_workers, batch_size=4, **arguments)
    append_line(folder / "processes", os.getpid())
    for _ in loader:
        for process in psutil.Process().children(recursive=True):
            append_line(folder / "processes", process.pid)
        append_line(folder / "batches", "batch")


def processes(folder: Path) -> set[int]:
    return {int(line) for line in lines(folder / "processes") + lines(folder / "busy")}


def wait_until_busy(folder: Path, num_workers: int, seconds: float = 20) -> None:
    wait_for(lambda: len(lines(folder / "batches")) == 4, "four batches", seconds)
    wait_for(lambda: len(lines(folder / "busy")) >= num_workers, "busy workers")


def all_gone(folder: Path) -> float:
    """Wait until all processes are gone; how many seconds that took."""
    begin = time.monotonic()
    wait_for(lambda: not any(map(is_alive, processes(folder))), f"the end of {processes(folder)}", WITHIN)
    return time.monotonic() - begin


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("methods", "num_workers"), [(["fork"], 2), (["spawn", "forkserver"], 1)])
def test_workers_end_within_seconds_after_the_main_process_is_killed(
    methods: list[str], num_workers: int, tmp_path: Path
) -> None:
    before, consumers = shared_memory_files(), []
    with ExitStack() as started:  # together, as those that are not forked take seconds to start
        for method in methods:
            (tmp_path / method).mkdir()
            arguments = {"multiprocessing_context": method}
            consumers.append(started.enter_context(child(consume, tmp_path / method, num_workers, arguments)))
        for method, process in zip(methods, consumers, strict=True):
            wait_until_busy(tmp_path / method, num_workers, 120)
            assert len(processes(tmp_path / method)) > num_workers
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            all_gone(tmp_path / method)
    assert shared_memory_files() <= before


def test_workers_end_too_where_a_sibling_of_the_main_process_keeps_their_pipes_open(tmp_path: Path) -> None:
    def with_sibling(folder: Path) -> None:
        loader = make_loader(Patches([4] * 20, fault=Slow(folder)), 2, batch_size=4)
        append_line(folder / "processes", os.getpid())
        for number, _ in enumerate(loader):
            if number == 0:
                sibling = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
                sibling.start()
                (folder / "sibling").write_text(f"{sibling.pid}")
            append_line(folder / "batches", "batch")

    with child(with_sibling, tmp_path) as process:
        wait_until_busy(tmp_path, 2)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        all_gone(tmp_path)
        assert is_alive(int((tmp_path / "sibling").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_ends_an_epoch_at_once(number: signal.Signals, tmp_path: Path) -> None:
    before = shared_memory_files()
    with child(consume, tmp_path, 2, {}) as process:
        wait_until_busy(tmp_path, 2)
        begin = time.monotonic()
        os.killpg(process.pid or 0, number)
        process.join(WITHIN)
        assert process.exitcode is not None, "it goes on"
        assert time.monotonic() - begin < 3
        all_gone(tmp_path)
    assert shared_memory_files() <= before


def test_workers_leave_ctrl_c_to_the_main_process(tmp_path: Path) -> None:
    with child(consume, tmp_path, 2, {}) as process:
        wait_until_busy(tmp_path, 2)
        for pid in processes(tmp_path) - {process.pid}:
            os.kill(pid, signal.SIGINT)
        time.sleep(0.3)
        assert all(is_alive(pid) for pid in processes(tmp_path))
