# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import wait

import pytest

from monai_patchqueue.queue.waking import Waker
from tests.processes import wait_for


@pytest.fixture
def waker() -> Iterator[Waker]:
    waker = Waker()
    yield waker
    waker.close()


def test_a_thread_that_is_woken_does_not_run_before_its_waker_lets_it(waker: Waker) -> None:
    turns = 0
    rounds = 30

    def take_turns() -> None:
        nonlocal turns
        while turns < rounds:
            wait([waker])
            waker.rest()
            turns += 1

    thread = threading.Thread(target=take_turns, daemon=True)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # nobody is made to let another thread run
    try:
        thread.start()
        for number in range(rounds):
            wait_for(lambda number=number: turns == number, "the thread to take its turn")  # type: ignore[misc]
            waker.wake()
            until = time.perf_counter() + 0.001
            while time.perf_counter() < until:  # time enough for a thread that may run
                pass
            assert turns == number
    finally:
        sys.setswitchinterval(interval)
    thread.join(10.0)
    assert turns == rounds


def test_what_is_noted_before_waking_is_always_seen(waker: Waker) -> None:
    noted, seen = 0, 0
    total = 20_000

    def watch() -> None:
        nonlocal seen
        while seen < total:
            wait([waker], timeout=10.0)
            waker.rest()
            seen = noted

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    for _ in range(total):
        noted += 1
        waker.wake()
    thread.join(30.0)
    assert seen == total


def test_waking_wakes_once_however_often_it_was_called(waker: Waker) -> None:
    for _ in range(3):
        waker.wake()
    assert wait([waker], timeout=0) == [waker]
    waker.rest()
    assert wait([waker], timeout=0) == []
    waker.wake()
    assert wait([waker], timeout=0) == [waker]


def test_waking_after_closing_does_nothing(waker: Waker) -> None:
    other = Waker()
    other.close()
    other.wake()
    assert wait([waker], timeout=0) == []
