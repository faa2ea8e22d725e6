# SPDX-License-Identifier: Apache-2.0
"""Workers that die at awkward moments, each by itself: the batches stay the same, or the consumer gets an error."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monai_patchqueue.queue.errors import WorkerDiedError
from tests.pipelines import Patches, append_line, digest, drawn, every_patch, goes_on, lines, make_loader
from tests.processes import die, idle, wait_for, wait_for_death, workers

pytestmark = pytest.mark.timeout(60)


class DieAt:
    """Dies when one volume is loaded, while a file exists; ``once`` removes it before."""

    def __init__(self, volume: int, flag: Path, how: Callable[[], object], once: bool = False) -> None:
        self.volume = volume
        self.flag = flag
        self.how = how
        self.once = once
        flag.touch()

    def __call__(self, volume: int) -> None:
        if volume == self.volume and self.flag.exists():
            if self.once:
                self.flag.unlink()
            self.how()
            wait_for_death()


def segfault() -> None:
    faulthandler.disable()  # pytest's would fill the screen
    ctypes.string_at(0)


def leave() -> None:
    os._exit(3)


WAYS = [
    pytest.param(die, "was killed by SIGKILL .*memory.*, 2 times", id="killed"),
    pytest.param(segfault, "was killed by SIGSEGV, 2 times", id="segfault"),
    pytest.param(leave, "ended with exit code 3, 2 times", id="exit"),
]


@pytest.mark.parametrize(("how", "message"), WAYS)
def test_a_worker_that_dies_once_is_replaced_and_dies_twice_is_an_error(
    how: Callable[[], object], message: str, tmp_path: Path
) -> None:
    expected = digest(make_loader([4] * 6, batch_size=4))
    with make_loader(Patches([4] * 6, fault=DieAt(3, tmp_path / "once", how, once=True)), 2, batch_size=4) as loader:
        assert digest(loader) == expected
    fault = DieAt(3, tmp_path / "die", how)
    with make_loader(Patches([4] * 6, fault=fault), 2, batch_size=4) as loader:
        with pytest.raises(WorkerDiedError, match=message) as caught:
            drawn(loader)
        assert "volume 3 (case_3.nii.gz)" in str(caught.value)
        fault.flag.unlink()
        goes_on(loader, [4] * 6)


def test_where_failures_are_replaced_a_volume_that_kills_is_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fault = DieAt(3, tmp_path / "die", die)
    with make_loader(Patches([4] * 6, fault=fault), 2, batch_size=4, on_error="replace") as loader:
        volumes = Counter(volume for volume, _ in drawn(loader))
        assert len(volumes) == 5
        assert volumes.total() == 24
        assert set(loader.stats().failure_counts) == {3}
    assert "volume 3 (case_3.nii.gz) failed and is replaced" in caplog.text
    assert "SIGKILL" in caplog.text


class Gate:
    """Says who prepares which volume, and holds some of them up until a file is there."""

    def __init__(self, folder: Path, held: tuple[int, ...]) -> None:
        self.folder = folder
        self.held = held

    def __call__(self, volume: int) -> None:
        append_line(self.folder / f"volume_{volume}", os.getpid())
        while volume in self.held and not (self.folder / "open").exists():
            time.sleep(0.005)

    def pid(self, volume: int) -> int:
        """Who has begun with a volume."""
        wait_for(lambda: lines(self.folder / f"volume_{volume}"), f"volume {volume}")
        return int(lines(self.folder / f"volume_{volume}")[-1])

    def open(self) -> None:
        (self.folder / "open").touch()


@pytest.mark.parametrize("victims", [(1,), (0, 1), (1, 1)])
def test_a_worker_killed_while_it_waits_for_its_first_slots_is_replaced(
    victims: tuple[int, ...], tmp_path: Path
) -> None:
    counts, gate = [4, 3, 2, 4, 1], Gate(tmp_path, held=(0,))
    expected = digest(make_loader(counts, batch_size=3))
    with make_loader(Patches(counts, fault=gate), 2, batch_size=3) as loader:
        batches = iter(loader)
        time_of = {}
        for place, victim in enumerate(victims):
            pid = gate.pid(victim)
            wait_for(lambda pid=pid, victim=victim: victim == 0 or idle([pid]), "a worker without slots")
            if place and victim == victims[0]:
                gate.open()  # killed a second time only if the first is forgiven: once it is written
                continue
            os.kill(pid, signal.SIGKILL)
            time_of[victim] = time.monotonic()
            wait_for(lambda victim=victim: len(lines(tmp_path / f"volume_{victim}")) == 2, "a second try")
        gate.open()
        assert digest(batches) == expected


def test_all_workers_killed_at_once_while_they_load_are_replaced(tmp_path: Path) -> None:
    counts, gate = [4] * 8, Gate(tmp_path, held=(0, 1, 2))
    expected = digest(make_loader(counts, batch_size=4, queue_length=8))
    with make_loader(Patches(counts, fault=gate), 3, batch_size=4, queue_length=8) as loader:
        batches = iter(loader)
        for pid in {gate.pid(volume) for volume in (0, 1, 2)}:
            os.kill(pid, signal.SIGKILL)
        for volume in (0, 1, 2):
            wait_for(lambda volume=volume: len(lines(tmp_path / f"volume_{volume}")) == 2, "a second try")
        gate.open()
        assert digest(batches) == expected


@pytest.mark.parametrize("persistent", [True, False])
def test_workers_killed_at_an_epochs_end_are_replaced(persistent: bool) -> None:
    counts = [3, 1, 2, 5]
    arguments: dict[str, Any] = {"batch_size": 2, "shuffle": True, "persistent_workers": persistent}
    undisturbed = make_loader(counts, **arguments)
    with make_loader(counts, 2, **arguments) as loader:
        for epoch in range(6):
            batches = iter(loader)
            content = [next(batches) for _ in range(len(loader))]
            wait_for(lambda: idle(workers()), "idle workers")
            for pid in workers():
                os.kill(pid, signal.SIGKILL)
            assert next(batches, None) is None
            assert digest(content) == digest(undisturbed), epoch
        assert Counter(drawn(loader)) == every_patch(counts)


def test_a_worker_that_is_stopped_for_a_while_delays_a_batch_and_changes_none() -> None:
    expected = digest(make_loader([4] * 12, batch_size=4, queue_length=8))
    with make_loader([4] * 12, 2, batch_size=4, queue_length=8) as loader:
        batches = []
        for batch in loader:
            batches.append(batch)
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for pid in workers():
                    os.kill(pid, number)
                time.sleep(0.03)
        assert digest(batches) == expected


def test_a_volume_that_was_waiting_its_turn_is_not_blamed_for_a_workers_death(tmp_path: Path) -> None:
    counts, victim = [1] * 20, 6
    expected = digest(make_loader(counts, queue_length=2))
    fault = DieAt(victim, tmp_path / "die", die, once=True)
    with make_loader(Patches(counts, tmp_path / "log", fault), 1, queue_length=2) as loader:
        batches = iter(loader)
        wait_for(lambda: loader.stats().volumes == victim and idle(workers()), "a full queue")
        assert str(victim) not in lines(tmp_path / "log")
        (worker,) = workers()
        os.kill(worker, signal.SIGSTOP)
        content = [next(batches), next(batches)]  # makes room for the next volume, which is sent to the worker
        time.sleep(0.2)
        os.kill(worker, signal.SIGKILL)
        assert digest([*content, *batches]) == expected
    assert lines(tmp_path / "log").count(str(victim)) == 2


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_the_start_of_a_worker_is_no_part_of_a_volumes_time(kind: str) -> None:
    def start_slowly(worker: int) -> None:
        time.sleep(0.6)

    arguments: dict[str, Any] = {"worker_type": kind, "worker_init_fn": start_slowly, "volume_timeout": 0.4}
    with make_loader([2] * 4, 2, **arguments) as loader:
        assert Counter(drawn(loader)) == every_patch([2] * 4)


def test_a_worker_that_always_dies_at_its_start_is_an_error_and_no_hang() -> None:
    with (
        make_loader([2] * 4, 2, worker_init_fn=lambda worker: die()) as loader,
        pytest.raises(WorkerDiedError, match=r"volume [01](.|\n)*SIGKILL"),
    ):
        drawn(loader)
