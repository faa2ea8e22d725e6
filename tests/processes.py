# SPDX-License-Identifier: Apache-2.0
"""Child processes for tests that kill, measure or limit whole processes.

They are forked: a fresh interpreter takes seconds to import torch.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist


def wait_for(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


def die() -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_death() -> None:
    """Wait until somebody else has killed this process."""
    while True:
        time.sleep(1)


def workers() -> list[int]:
    """This process's children that run now, without multiprocessing's helpers, which stay.

    Some that ended in earlier tests may not have been waited for.
    """
    return [process.pid for process in psutil.Process().children() if is_alive(process.pid) and not is_helper(process)]


def is_helper(process: psutil.Process) -> bool:
    """Whether a process is a fork server or tracks resources."""
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        command = " ".join(process.cmdline())
        return "multiprocessing.forkserver" in command or "multiprocessing.resource_tracker" in command
    return False


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie, which nobody has waited for yet, does not)."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def idle(pids: Iterable[int]) -> bool:
    """Whether processes sleep with all their threads, and still do so a moment later, having done nothing."""
    seen = []
    for _ in range(4):
        with suppress(psutil.NoSuchProcess):
            processes = [psutil.Process(pid) for pid in pids]
            seen.append([(_asleep(p), p.num_ctx_switches(), p.cpu_times()) for p in processes])
        time.sleep(0.01)
    return len(seen) == 4 and all(look == seen[0] for look in seen) and all(asleep for asleep, *_ in seen[0])


def _asleep(process: psutil.Process) -> bool:
    """Whether no thread of a process does anything, or would if it were its turn (only Linux tells for each)."""
    states = set()
    with suppress(OSError):
        for task in Path(f"/proc/{process.pid}/task").glob("*/stat"):
            states.add(task.read_text().rpartition(")")[2].split()[0])
    return process.status() == psutil.STATUS_SLEEPING and states <= {"S"}


def shared_memory_files() -> set[str]:
    """What lies in ``/dev/shm``."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def pss(pid: int | None = None) -> int:
    """Memory of a process and its children in bytes, pages that several share counted once."""
    me = psutil.Process(pid)
    total = 0
    for process in (me, *me.children(recursive=True)):
        with suppress(OSError, StopIteration):
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            total += 1024 * next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


def resident() -> int:
    """Memory that this process and its children have written to, in bytes.

    A page that a process copies because it shares it with one that it was forked from counts before and after.
    """
    total = 0
    for pid in (os.getpid(), *workers()):
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            total += sum(
                1024 * int(line.split()[1]) for line in status.splitlines() if line[:7] in ("RssAnon", "RssShme")
            )
    return total


def _forget_helpers() -> None:
    """Forget multiprocessing's helpers, as a process that was not forked would have none: they are the parent's."""
    tracker = multiprocessing.resource_tracker._resource_tracker  # type: ignore[attr-defined]
    tracker._fd = tracker._pid = None
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None


@contextmanager
def child(target: Callable[..., object], *arguments: Any) -> Iterator[BaseProcess]:
    """Run a function in a child with a process group of its own, of which nothing is left afterwards."""

    def main() -> None:
        os.setpgid(0, 0)
        _forget_helpers()
        gc.unfreeze()  # what the tests' session has frozen, so that a child pays for collecting as any process does
        torch.set_num_threads(1)  # the pool of threads does not come through a fork
        target(*arguments)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    try:
        yield process
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()


def in_children(targets: Sequence[Callable[[], Any]], seconds: float = 100.0) -> list[Any]:
    """What functions return, each called in a child of its own, all at the same time."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in targets]

    def report(number: int) -> None:
        try:
            result = True, targets[number]()
        except BaseException:
            result = False, traceback.format_exc()
        pipes[number][1].send(result)

    def nested(number: int, started: list[BaseProcess]) -> list[Any]:
        if number < len(targets):
            with child(report, number) as process:
                return nested(number + 1, [*started, process])
        results = []
        for process, (receiver, sender) in zip(started, pipes, strict=True):
            sender.close()
            assert receiver.poll(seconds), f"no answer within {seconds} s"
            try:
                fine, result = receiver.recv()
            except EOFError:
                process.join()
                raise AssertionError(f"the child ended with exit code {process.exitcode}") from None
            results.append((fine, result))
        assert all(fine for fine, _ in results), "\n\n".join(result for fine, result in results if not fine)
        return [result for _, result in results]

    return nested(0, [])


def in_child(target: Callable[[], Any], seconds: float = 100.0) -> Any:
    """What a function returns in a child process."""
    return in_children([target], seconds)[0]


def on_ranks(world: int, target: Callable[[], Any], folder: Path) -> list[Any]:
    """What a function returns on each rank of a process group."""

    def rank_main(rank: int) -> Any:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        meeting = f"file://{folder}/meeting_{world}_{target.__name__}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=30))
        result = target()
        dist.barrier()
        dist.destroy_process_group()
        return result

    return in_children([partial(rank_main, rank) for rank in range(world)])
