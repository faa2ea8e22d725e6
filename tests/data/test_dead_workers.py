# SPDX-License-Identifier: Apache-2.0
"""Workers that die, hang or go away: named, replaced where that helps, and never a hang of the consumer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from monai_patchqueue.queue.errors import WorkerDiedError
from tests.pipelines import Patches, drawn, every_patch, goes_on, make_loader

pytestmark = pytest.mark.timeout(30)


class KillAt:
    """Kills its own process when one volume is loaded, while a file exists; ``once`` removes it before."""

    def __init__(self, volume: int, flag: Path, number: int = signal.SIGKILL, once: bool = False) -> None:
        self.volume = volume
        self.flag = flag
        self.number = number
        self.once = once
        flag.touch()

    def __call__(self, volume: int) -> None:
        if volume == self.volume and self.flag.exists():
            if self.once:
                self.flag.unlink()
            os.kill(os.getpid(), self.number)
            time.sleep(10)


@pytest.mark.parametrize("volume", [0, 3])
def test_the_volume_of_a_killed_worker_is_prepared_again_with_the_same_patches(volume: int, tmp_path: Path) -> None:
    expected = [batch["noise"] for batch in make_loader([4] * 6, batch_size=4, shuffle=True)]
    fault = KillAt(volume, tmp_path / "kill", once=True)
    with make_loader(Patches([4] * 6, fault=fault), 2, batch_size=4, shuffle=True) as loader:
        batches = list(loader)
        assert torch.equal(torch.cat([batch["noise"] for batch in batches]), torch.cat(expected))
        assert Counter(drawn(loader)) == every_patch([4] * 6)
    assert not fault.flag.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_volume_that_kills_its_worker_twice_is_named_with_the_signal(number: signal.Signals, tmp_path: Path) -> None:
    fault = KillAt(2, tmp_path / "kill", number)
    with make_loader(Patches([4] * 6, fault=fault), 2, batch_size=4) as loader:
        with pytest.raises(WorkerDiedError, match=f"volume 2 .case_2.nii.gz.(.|\n)*{number.name}"):
            drawn(loader)
        fault.flag.unlink()
        goes_on(loader, [4] * 6)


def test_all_workers_killed_between_batches_are_replaced() -> None:
    with make_loader([4] * 40, 2, batch_size=4, queue_length=8) as loader:
        batches = []
        for number, batch in enumerate(loader):
            batches.append(batch)
            if number in (3, 20):
                for child in multiprocessing.active_children():
                    os.kill(child.pid or 0, signal.SIGKILL)
                time.sleep(0.05)
        assert Counter(drawn(batches)) == every_patch([4] * 40)


def test_an_executor_that_breaks_for_good_is_an_error_and_no_hang(tmp_path: Path) -> None:
    with (
        ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool,
        make_loader(Patches([4] * 6, fault=KillAt(2, tmp_path / "kill")), executor=pool, batch_size=4) as loader,
        pytest.raises(RuntimeError, match="volume"),
    ):
        drawn(loader)


def test_an_executor_that_was_shut_down_is_an_error_and_no_hang() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with make_loader([4] * 6, executor=pool) as loader, pytest.raises(RuntimeError, match=r"volume 0(.|\n)*shutdown"):
        drawn(loader)


class Slow:
    """Takes long with one volume, while a file exists."""

    def __init__(self, volume: int, flag: Path, seconds: float) -> None:
        self.volume = volume
        self.flag = flag
        self.seconds = seconds
        flag.touch()

    def __call__(self, volume: int) -> None:
        end = time.monotonic() + self.seconds
        while volume == self.volume and self.flag.exists() and time.monotonic() < end:
            time.sleep(0.01)


@pytest.mark.parametrize("kind", ["thread", "process"])
@pytest.mark.parametrize("volume", [0, 4])
def test_a_volume_that_takes_too_long_is_given_up_and_named(kind: str, volume: int, tmp_path: Path) -> None:
    fault = Slow(volume, tmp_path / "slow", seconds=20)
    arguments = {"worker_type": kind, "volume_timeout": 0.5, "batch_size": 4}
    with make_loader(Patches([4] * 6, fault=fault), 2, **arguments) as loader:
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match=rf"volume {volume} \(case_{volume}(.|\n)*volume_timeout=0.5"):
            drawn(loader)
        assert time.monotonic() - begin < 5
        fault.flag.unlink()
        goes_on(loader, [4] * 6)


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_volumes_that_wait_their_turn_do_not_time_out(kind: str) -> None:
    def slow(volume: int) -> None:
        time.sleep(0.1)

    with make_loader(Patches([2] * 6, fault=slow), 1, worker_type=kind, volume_timeout=0.6, queue_length=2) as loader:
        iterator = iter(loader)
        draws = drawn([next(iterator)])
        time.sleep(0.9)  # the queue is full, workers wait
        assert Counter(draws + drawn(iterator)) == every_patch([2] * 6)


def test_a_timeout_of_the_whole_batch_can_be_waited_out(tmp_path: Path) -> None:
    fault = Slow(0, tmp_path / "slow", seconds=20)
    with make_loader(Patches([4] * 2, fault=fault), 1, worker_type="thread", timeout=0.2) as loader:
        iterator = iter(loader)
        with pytest.raises(TimeoutError, match=r"timeout=0.2"):
            next(iterator)
        fault.flag.unlink()
        time.sleep(0.2)
        assert Counter(drawn(iterator)) == every_patch([4] * 2)
