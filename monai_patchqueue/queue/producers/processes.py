# SPDX-License-Identifier: Apache-2.0
"""Volumes prepared in processes of our own.

One duplex pipe and one sentinel per worker, and no shared queue: a worker that is killed can hold no lock that others
need, and its volume is known. Only tickets, slot numbers and records cross; patches are written into the slab.
"""

from __future__ import annotations

import multiprocessing.connection as mpc
import os
import pickle
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import torch

from ..child import SAFETY, describe_exit, hang_up, start_child
from ..errors import Failure, WorkerDiedError
from ..handover import Parcel, Receiver, Sender
from ..pickling import describe_unpicklable, dumps
from ..record import slab_specs
from ..slab import Slab, SlabHandle, SlabInfo, SlabLayout
from ..waking import Waker
from ..worker import MisfitError, Preparer, Recipe, write
from .base import Assignment, Event, Failed, InMemory, NeedsSlots, Producer, Written

__all__ = ["ProcessProducer"]

# A volume that kills its worker is tried in a second one.
_TRIES = 2


@dataclass(frozen=True)
class _Begun:
    """A worker takes up an assignment: from now on the clock runs, and if it dies, this volume may be the reason.

    Without a number: it has started.
    """

    number: int | None = None


class _ProcessWorker:
    """One process and the assignments it has, in order."""

    def __init__(self, index: int, producer: ProcessProducer) -> None:
        self.index = index
        self.assignments: deque[Assignment] = deque()
        self.busy_since: float | None = None
        self._begun: _Begun | None = None
        self.process, self.connection = start_child(
            producer.context,
            _main,
            (index, producer.num_workers, producer.recipe, producer.handle),
            name=f"patchqueue-worker-{index}",
            sent=producer.recipe,
            instead="worker_type='thread'",
        )
        self._receiver = Receiver(self.connection, keep=1)

    @property
    def name(self) -> str:
        return f"worker process {self.index}, pid {self.process.pid}"

    def send(self, *message: Any) -> None:
        with suppress(ConnectionError):  # it has died: its sentinel says so too
            self.connection.send_bytes(dumps(message))

    def assign(self, assignment: Assignment) -> None:
        self.assignments.append(assignment)
        self.send("assign", assignment)

    def receive(self) -> list[Event]:
        """All that the worker has sent; what a killed worker was in the middle of sending is left out."""
        events: list[Event] = []
        try:
            while self.connection.poll():
                message: Event | _Begun | Parcel = pickle.loads(self.connection.recv_bytes())
                if isinstance(message, _Begun):
                    self._begun = message
                    self.busy_since = None if message.number is None else time.monotonic()
                    continue
                event = self._unpack(message) if isinstance(message, Parcel) else message
                events.append(event)
                self.busy_since = None
                if not isinstance(event, NeedsSlots):
                    self.assignments.popleft()
        except (EOFError, ConnectionError, OSError):
            pass
        return events

    def _unpack(self, parcel: Parcel) -> InMemory:
        content, acknowledgement = self._receiver.receive(parcel)
        self.send("taken", acknowledgement)
        return InMemory(*content)

    def culprit(self) -> Assignment | None:
        """The assignment whose volume a dead worker may have died of.

        A worker that is killed while it waits, or before it takes up what it was just sent, accuses none; one that dies
        while it starts does, as it would be started again for ever.
        """
        first = self.assignments[0] if self.assignments else None
        return first if first and (self._begun is None or self._begun.number == first.number) else None

    def stop(self) -> None:
        hang_up(self.connection)
        if self.assignments or self.process.exitcode is None:
            self.process.terminate()


class ProcessProducer(Producer):
    """Prepares volumes in ``num_workers`` processes.

    A worker that dies is replaced; the volume that it was preparing is tried once more, then reported as failed. A
    volume that takes longer than ``volume_timeout`` seconds is given up and its worker killed.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_workers: int,
        context: BaseContext,
        handle: SlabHandle,
        volume_timeout: float | None = None,
    ) -> None:
        self.num_workers = num_workers
        self.recipe = recipe
        self.context = context
        self.handle = handle
        self._timeout = volume_timeout
        self._info: SlabInfo | None = None
        self._tries: dict[int, int] = {}
        self._waker = Waker()
        self._closed = False
        self._workers = [_ProcessWorker(i, self) for i in range(num_workers)]

    def capacity(self) -> int:
        # One more than in preparation, so that no worker waits for this process to look.
        depth = 2 if self._info else 1
        return sum(depth - len(worker.assignments) for worker in self._workers)

    def submit(self, assignment: Assignment) -> None:
        min(self._workers, key=lambda worker: len(worker.assignments)).assign(assignment)

    def wait(self) -> list[Event]:
        while True:
            events, woken = self._collect(self._poll_timeout())
            if events or woken:
                return events

    def grant(self, number: int, slots: Sequence[int]) -> None:
        for worker in self._workers:
            for place, assignment in enumerate(worker.assignments):
                if assignment.number == number:
                    worker.assignments[place] = assignment._replace(slots=slots)
                    worker.send("grant", number, slots)
                    return

    def announce(self, info: SlabInfo) -> None:
        self._info = info
        for worker in self._workers:
            self._tell_layout(worker)

    def wake(self) -> None:
        self._waker.wake()

    def close(self) -> None:
        self._closed = True
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.process.join(1.0)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join(1.0)
        self._waker.close()

    def _tell_layout(self, worker: _ProcessWorker) -> None:
        if self._info is not None:
            worker.send("layout", self._info.slab.layout, self.handle.name, self._info.first)

    def _poll_timeout(self) -> float:
        since = [worker.busy_since for worker in self._workers if worker.busy_since is not None]
        if self._timeout is None or not since:
            return SAFETY
        return min(max(min(since) + self._timeout - time.monotonic(), 0.0), SAFETY)

    def _collect(self, timeout: float | None) -> tuple[list[Event], bool]:
        """What workers have sent, or have died of, within ``timeout`` seconds, and whether this thread was woken."""
        objects: list[Any] = [self._waker]
        for worker in self._workers:
            objects += [worker.connection, worker.process.sentinel]
        ready: set[Any] = set(mpc.wait(objects, timeout))
        events: list[Event] = []
        for index, worker in enumerate(self._workers):
            if worker.connection in ready:
                events += worker.receive()
            if worker.process.sentinel in ready or (not ready and worker.process.exitcode is not None):
                events += worker.receive()  # it may have sent something and then died
                events += self._replace(index, None)
            elif self._is_late(worker):
                message = f"took longer than volume_timeout={self._timeout} s."
                late = worker.culprit()
                worker.process.kill()
                events += worker.receive()  # perhaps it has just finished, and begun with another volume
                failure = Failure(TimeoutError, message) if worker.culprit() is late else None
                events += self._replace(index, failure)
        for event in events:
            if not isinstance(event, NeedsSlots):
                self._tries.pop(event.number, None)
        woken = self._waker in ready
        if woken:
            self._waker.rest()
        return events, woken

    def _is_late(self, worker: _ProcessWorker) -> bool:
        since = worker.busy_since
        return self._timeout is not None and since is not None and time.monotonic() - since >= self._timeout

    def _replace(self, index: int, failure: Failure | None) -> list[Event]:
        """Start a new worker in place of a dead one, and give its volumes to it."""
        dead = self._workers[index]
        dead.process.join()
        events: list[Event] = []
        culprit, assignments = dead.culprit(), deque(dead.assignments)
        dead.assignments.clear()
        if culprit is not None:
            tries = self._tries[culprit.number] = self._tries.get(culprit.number, 0) + 1
            if failure is None and tries >= _TRIES:
                failure = Failure(WorkerDiedError, f"its worker {describe_exit(dead.process.exitcode)}, {tries} times.")
            if failure is not None:
                events.append(Failed(culprit.number, failure, dead.name))
                assignments.popleft()
        dead.stop()
        if self._closed:
            return events
        worker = self._workers[index] = _ProcessWorker(index, self)
        self._tell_layout(worker)
        for assignment in assignments:
            worker.assign(assignment)
        return events


def _main(connection: Connection[Any, Any], index: int, num_workers: int, recipe: Recipe, handle: SlabHandle) -> None:
    """A worker process, from start to end."""
    _Loop(index, num_workers, recipe, handle, connection).run()


class _Loop:
    """Messages in, events out."""

    def __init__(
        self, index: int, num_workers: int, recipe: Recipe, handle: SlabHandle, connection: Connection[Any, Any]
    ) -> None:
        self._connection = connection
        self._sender = Sender(connection)
        self._keep_misfits = recipe.keep_misfits
        self._handle = handle
        self._todo: deque[Assignment] = deque()
        self._granted: dict[int, Sequence[int]] = {}
        self._slab: Slab | None = None
        self._first = ""
        self._preparer: Preparer | None = None
        self._start_failure: Failure | None = None
        try:
            self._introduce(index, num_workers, recipe)
            preparer = Preparer(recipe, "process", written=True)
            if recipe.worker_init_fn is not None:
                recipe.worker_init_fn(index)
            self._preparer = preparer
        except Exception as error:
            self._start_failure = Failure.of(error)
        self._name = f"worker process {index}, pid {os.getpid()}"

    @staticmethod
    def _introduce(index: int, num_workers: int, recipe: Recipe) -> None:
        """Let ``torch.utils.data.get_worker_info`` answer as in a DataLoader's worker."""
        worker_info = torch.utils.data._utils.worker
        worker_info._worker_info = worker_info.WorkerInfo(
            id=index, num_workers=num_workers, seed=recipe.seed, dataset=recipe.dataset
        )

    def run(self) -> None:
        self._send(_Begun())
        while True:
            while not self._todo:
                self._receive()
            assignment = self._todo.popleft()
            self._send(_Begun(assignment.number))
            try:
                event = self._work(assignment)
            except (EOFError, ConnectionError):
                raise
            except (Exception, SystemExit) as error:
                event = Failed(assignment.number, Failure.of(error), self._name)
            if event is not None:
                self._send(event)

    def _work(self, assignment: Assignment) -> Event | None:
        number, ticket, slots = assignment
        if self._preparer is None:
            return Failed(number, self._start_failure or Failure(RuntimeError, "did not start."), self._name)
        volume = self._preparer(ticket)
        if slots is None:
            self._send(NeedsSlots(number, slab_specs(volume.patches[0])))
            while number not in self._granted:
                self._receive()
            slots = self._granted.pop(number)
        while self._slab is None:
            self._receive()
        try:
            return Written(number, write(volume, self._slab, slots, self._first))
        except MisfitError:
            if not self._keep_misfits:
                raise
            self._sender.send((number, volume))
            return None

    def _send(self, event: Event | _Begun) -> None:
        try:
            message = dumps(event)
        except Exception as error:
            if isinstance(event, Written):
                text = f"gave a patch whose {describe_unpicklable(event.record)} cannot be pickled: {error}"
                failure = Failure(TypeError, text)
            elif isinstance(event, Failed):  # its class is known to this process alone
                text = f"{event.failure.kind.__name__}: {event.failure.message}"
                failure = Failure(RuntimeError, text, event.failure.trace)
            else:
                raise
            message = dumps(Failed(event.number, failure, self._name))
        self._connection.send_bytes(message)

    def _receive(self) -> None:
        kind, *content = pickle.loads(self._connection.recv_bytes())
        if kind == "assign":
            self._todo.append(content[0])
        elif kind == "grant":
            self._granted[content[0]] = content[1]
        elif kind == "taken":
            self._sender.acknowledged(content[0])
        else:
            self._map(*content)

    def _map(self, layout: SlabLayout, name: str | None, first: str) -> None:
        self._slab = Slab(self._handle, layout, name=name, attach=True)
        self._first = first
