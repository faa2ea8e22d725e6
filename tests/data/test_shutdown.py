# SPDX-License-Identifier: Apache-2.0
"""A loader leaves nothing behind, however it ends."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from monai_patchqueue import PatchQueueLoader
from monai_patchqueue.data import launch
from monai_patchqueue.queue.slab import SlabHandle
from tests.pipelines import Patches, drawn, every_patch, make_loader
from tests.processes import is_alive, wait_for
from tests.programs import Interpreter, Program

pytestmark = pytest.mark.timeout(60)

KINDS = ["inline", "thread", "process"]


def workers(kind: str) -> dict[str, Any]:
    return {} if kind == "inline" else {"num_workers": 2, "worker_type": kind}


def held() -> dict[str, Any]:
    """What a process may leave behind."""
    gc.collect()
    return {
        "threads": sorted(t.name for t in threading.enumerate() if t.name.startswith("patchqueue")),
        "processes": len(multiprocessing.active_children()),
        "files": psutil.Process().num_fds(),
        "shm": {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "torch_"))},
    }


def by_close(loader: PatchQueueLoader) -> None:
    loader.close()
    loader.close()


def by_context(loader: PatchQueueLoader) -> None:
    with loader:
        next(iter(loader))


def by_forgetting(loader: PatchQueueLoader) -> None:
    del loader


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draws", [0, 3, None], ids=["before", "middle", "after"])
@pytest.mark.parametrize("end", [by_close, by_context, by_forgetting])
def test_an_ended_loader_leaves_no_process_thread_file_or_shared_memory(
    end: Callable[[PatchQueueLoader], None], draws: int | None, kind: str
) -> None:
    before = held()
    loader = make_loader([4] * 20, **workers(kind), batch_size=4, start_background=True)
    batches = list(islice(loader, draws)) if draws != 0 else []
    iterator = iter(loader) if draws == 3 else None
    end(loader)
    del loader, iterator
    deadline = time.monotonic() + 5
    while held() != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert held() == before
    drawn(batches)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_loader_starts_anew(kind: str) -> None:
    loader = make_loader([4] * 8, **workers(kind), batch_size=4, shuffle=True)
    iterator = iter(loader)
    next(iterator)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(iterator)
    assert sorted(drawn(loader)) == sorted(every_patch([4] * 8))
    assert loader.stats().epoch == 1
    loader.close()


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_closing_does_not_wait_for_volumes_in_preparation(kind: str) -> None:
    def slow(volume: int) -> None:
        end = time.monotonic() + 20
        while volume and time.monotonic() < end:
            time.sleep(0.01)

    loader = make_loader(Patches([4] * 8, fault=slow), **workers(kind), batch_size=4)
    next(iter(loader))
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 2


def test_an_executor_stays_the_users() -> None:
    with ThreadPoolExecutor(2) as pool:
        with make_loader([4] * 8, executor=pool, batch_size=4) as loader:
            next(iter(loader))
        assert pool.submit(int, "7").result() == 7


@pytest.mark.parametrize("kind", ["inline", "thread", "process"])
def test_plain_shared_memory_serves_where_there_is_no_memfd(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SlabHandle", lambda shared: SlabHandle(shared=shared, memfd=False))
    before = held()
    with make_loader([4] * 20, **workers(kind), batch_size=4, shuffle=True) as loader:
        draws = [drawn(loader) for _ in range(2)]
    monkeypatch.undo()
    with make_loader([4] * 20, batch_size=4, shuffle=True) as reference:
        assert draws == [drawn(reference) for _ in range(2)]
    after = held()
    tracker = 1  # multiprocessing's resource tracker stays, with a pipe to it
    assert after["files"] <= before["files"] + tracker
    assert {name: after[name] for name in ("threads", "processes", "shm")} == {
        name: before[name] for name in ("threads", "processes", "shm")
    }


# -- what is the caller's


def caller_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state()],  # noqa: NPY002
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "method": multiprocessing.get_start_method(allow_none=True),
        "directory": os.getcwd(),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_callers_state_changes(kind: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = caller_state()

        def unchanged(what: str) -> None:
            after = caller_state()
            assert [name for name in before if before[name] != after[name]] == [], what

        loader = make_loader([4] * 8, **workers(kind), batch_size=4, shuffle=True)
        unchanged("construction")
        len(loader), repr(loader), loader.stats(), loader.memory_bytes()
        unchanged("looking")
        iterator = iter(loader)
        unchanged("opening an epoch")
        next(iterator)
        unchanged("a batch")
        list(iterator), list(loader)
        unchanged("whole epochs")
        loader.close()
        unchanged("closing")
    finally:
        torch.set_num_threads(threads)


# -- processes that end


PROGRAM = """
import os, time, warnings
warnings.simplefilter("ignore")
from tests.pipelines import *
def slow(volume):
    time.sleep({seconds})
loader = make_loader(Patches([4] * 40, fault=slow), {workers}, batch_size=4)
iterator = iter(loader)
next(iterator)
print("pids", os.getpid(), *(p.pid for p in __import__("multiprocessing").active_children()), flush=True)
{then}
"""

OF_PROCESSES = "num_workers=2"
OF_THREADS = "num_workers=2, worker_type='thread'"


def start(interpreter: Interpreter, workers: str, then: str, seconds: float = 0.001) -> tuple[Program, list[int]]:
    """A program in a process group of its own that has got a batch, and the pids of all its processes."""
    program = interpreter.start("-c", PROGRAM.format(workers=workers, then=then, seconds=seconds))
    wait_for(lambda: program.output.endswith("\n") or program.poll() is not None, "a batch")
    word, *pids = program.output.split() or [""]
    assert word == "pids", program.errors
    return program, [int(pid) for pid in pids]


def gone(pids: list[int], within: float) -> None:
    wait_for(lambda: not any(map(is_alive, pids)), f"the end of {pids}", within)


@pytest.mark.parametrize(("workers", "then"), [(OF_PROCESSES, ""), (OF_THREADS, ""), (OF_PROCESSES, "list(iterator)")])
def test_an_interpreter_ends_with_exit_code_0_and_silently(workers: str, then: str, interpreter: Interpreter) -> None:
    program, pids = start(interpreter, workers, then)
    assert program.wait(20) == 0, program.errors
    assert program.errors == ""
    gone(pids, within=2)


def test_workers_end_when_their_parent_is_killed(interpreter: Interpreter) -> None:
    program, pids = start(interpreter, OF_PROCESSES, "time.sleep(60)", seconds=0.3)
    assert len(pids) == 3
    os.kill(pids[0], signal.SIGKILL)
    assert program.wait(5) == -signal.SIGKILL
    gone(pids, within=5)


@pytest.mark.parametrize("workers", [OF_PROCESSES, OF_THREADS])
def test_ctrl_c_in_the_middle_of_an_epoch_ends_at_once(workers: str, interpreter: Interpreter) -> None:
    program, pids = start(interpreter, workers, "list(iterator)", seconds=1)
    time.sleep(0.3)
    begin = time.monotonic()
    os.killpg(pids[0], signal.SIGINT)
    returncode = program.wait(20)
    assert time.monotonic() - begin < 4
    assert "KeyboardInterrupt" in program.errors
    assert program.errors.count("Traceback") == 1, program.errors
    assert returncode in (1, -signal.SIGINT)
    gone(pids, within=2)
