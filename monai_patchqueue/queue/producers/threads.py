# SPDX-License-Identifier: Apache-2.0
"""Volumes prepared in threads, each with transforms of its own."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import torch

from ..errors import Failure
from ..exiting import end_at_exit, interrupt
from ..record import slab_specs
from ..slab import SlabInfo
from ..worker import MisfitError, Preparer, Recipe, write
from .base import Assignment, Event, Failed, InMemory, NeedsSlots, Producer, Written

__all__ = ["ThreadProducer", "one_openmp_thread"]


class _ThreadWorker:
    """One thread, with transforms of its own."""

    def __init__(self, index: int, recipe: Recipe, producer: ThreadProducer) -> None:
        self.index = index
        self.grants: SimpleQueue[Sequence[int]] = SimpleQueue()
        self._recipe = recipe
        self._producer = producer
        self._lock = threading.Lock()
        self._preparing: tuple[Assignment, float] | None = None
        self._abandoned = False
        self.interrupted = False
        self.thread = threading.Thread(target=self._run, name=f"patchqueue-worker-{index}", daemon=True)
        end_at_exit(self)
        self.thread.start()

    def deadline(self, timeout: float) -> float | None:
        """When the volume that is being prepared will have taken too long."""
        preparing = self._preparing
        return None if preparing is None else preparing[1] + timeout

    def abandon(self) -> Assignment | None:
        """Stop listening to the thread, whose volume is given back, unless that is prepared already."""
        with self._lock:
            preparing, self._preparing = self._preparing, None
            self._abandoned = True
            if preparing is None:
                return None
        self.interrupted = True
        interrupt(self.thread)
        return preparing[0]

    def _run(self) -> None:
        with suppress(SystemExit):  # how an abandoned thread ends
            self._serve()

    def _serve(self) -> None:
        one_openmp_thread()
        producer = self._producer
        try:
            preparer = Preparer(self._recipe, "thread", written=True)
            if self._recipe.worker_init_fn is not None:
                self._recipe.worker_init_fn(self.index)
        except Exception as error:
            while (assignment := producer.todo.get()) is not None:
                producer.events.put(Failed(assignment.number, Failure.of(error), self.thread.name))
            return
        while not self._abandoned and (assignment := producer.todo.get()) is not None:
            self._preparing = assignment, time.monotonic()
            event = self._work(preparer, assignment)
            if event is not None:
                producer.events.put(event)

    def _work(self, preparer: Preparer, assignment: Assignment) -> Event | None:
        number, ticket, slots = assignment
        failure = None
        try:
            volume = preparer(ticket)
        except (Exception, SystemExit) as error:
            failure = Failed(number, Failure.of(error), self.thread.name)
        with self._lock:
            if self._abandoned:
                return None
            self._preparing = None
        if failure is not None:
            return failure
        try:
            if slots is None:
                self._producer.waiting[number] = self
                self._producer.events.put(NeedsSlots(number, slab_specs(volume.patches[0])))
                slots = self.grants.get()
            info = self._producer.info
            if info is None:
                return None
            return Written(number, write(volume, info.slab, slots, info.first))
        except MisfitError as error:
            keep = self._recipe.keep_misfits
            return InMemory(number, volume) if keep else Failed(number, Failure.of(error), self.thread.name)
        except Exception as error:
            return Failed(number, Failure.of(error), self.thread.name)


class ThreadProducer(Producer):
    """Prepares volumes in ``num_workers`` threads.

    Each thread has a copy of the transforms, and shares data and caches. A volume that takes longer than
    ``volume_timeout`` seconds is given up, and its thread abandoned, as threads cannot be killed.
    """

    def __init__(self, recipe: Recipe, num_workers: int, volume_timeout: float | None = None) -> None:
        self.num_workers = num_workers
        self.info: SlabInfo | None = None
        self.todo: SimpleQueue[Assignment | None] = SimpleQueue()
        self.events: SimpleQueue[Event | None] = SimpleQueue()
        self.waiting: dict[int, _ThreadWorker] = {}
        self._timeout = volume_timeout
        self._recipe = recipe
        self._outstanding = 0
        self._workers = [_ThreadWorker(i, recipe.for_thread(), self) for i in range(num_workers)]

    def capacity(self) -> int:
        return 2 * self.num_workers - self._outstanding if self.info else self.num_workers - self._outstanding

    def submit(self, assignment: Assignment) -> None:
        self._outstanding += 1
        self.todo.put(assignment)

    def wait(self) -> list[Event]:
        events: list[Event] = []
        event = self._next_event()
        while event is not None:
            events.append(event)
            try:
                event = self.events.get_nowait()
            except Empty:
                break
        self._outstanding -= sum(not isinstance(event, NeedsSlots) for event in events)
        return events

    def _next_event(self) -> Event | None:
        while True:
            deadlines = [w.deadline(self._timeout) for w in self._workers] if self._timeout is not None else []
            deadline = min((d for d in deadlines if d is not None), default=None)
            if deadline is None and self._timeout is not None:
                deadline = time.monotonic() + self._timeout  # a volume may be taken up any moment
            try:
                return self.events.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0.001))
            except Empty:
                event = self._give_up_on_late_volumes()
                if event is not None:
                    return event

    def _give_up_on_late_volumes(self) -> Event | None:
        for index, worker in enumerate(self._workers):
            deadline = worker.deadline(self._timeout or 0.0)
            if deadline is not None and time.monotonic() >= deadline:
                assignment = worker.abandon()
                self._workers[index] = _ThreadWorker(index, self._recipe.for_thread(), self)
                if assignment is not None:
                    message = f"took longer than volume_timeout={self._timeout} s."
                    return Failed(assignment.number, Failure(TimeoutError, message), worker.thread.name)
        return None

    def grant(self, number: int, slots: Sequence[int]) -> None:
        self.waiting.pop(number).grants.put(slots)

    def announce(self, info: SlabInfo) -> None:
        self.info = info

    def wake(self) -> None:
        self.events.put(None)

    def close(self) -> None:
        self.info = None
        for worker in self._workers:
            worker.abandon()
            self.todo.put(None)
            worker.grants.put(())


def one_openmp_thread() -> None:
    """Let this thread alone compute without helpers: ``torch.set_num_threads`` would change the caller's too."""
    torch.get_num_threads()  # torch sets a new thread's number when first asked for it, and would undo ours later
    for library in _openmp_libraries():
        try:
            ctypes.CDLL(library).omp_set_num_threads(1)
        except (OSError, AttributeError):  # not loaded, or another OpenMP: try the next
            continue
        else:
            return


def _openmp_libraries() -> list[str]:
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            paths: dict[str, Any] = {line.split()[-1]: None for line in maps if "omp" in line.rsplit("/", 1)[-1]}
    except OSError:
        paths = {}
    return [*paths, "libomp.dylib", "libiomp5md.dll", "vcomp140.dll"]
