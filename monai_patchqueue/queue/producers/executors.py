# SPDX-License-Identifier: Apache-2.0
"""Volumes prepared in an executor that the user hands in: a pool, or a cluster's."""

from __future__ import annotations

import itertools
import os
import pickle
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from queue import SimpleQueue
from typing import Any

from ..errors import Failure
from ..pickling import dumps
from ..schedule import Ticket
from ..worker import PreparedVolume, Preparer, Recipe
from .base import Assignment, Event, Failed, InMemory, Producer
from .threads import one_openmp_thread

__all__ = ["ExecutorProducer", "parallelism"]

_tokens = itertools.count()
# Preparers of this thread, by recipe: an executor's thread may serve several loaders, and outlive them.
_local = threading.local()


def parallelism(executor: Executor) -> int:
    """Volumes that an executor prepares at the same time, as far as it says."""
    return int(getattr(executor, "_max_workers", None) or os.cpu_count() or 1)


class _SharedRecipe:
    """A recipe that is pickled, where an executor does that, once."""

    def __init__(self, recipe: Recipe, token: tuple[int, int]) -> None:
        self.recipe = recipe
        self.token = token
        self._bytes: bytes | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        self._bytes = self._bytes or pickle.dumps(self.recipe)
        return _recipe_from_bytes, (self._bytes, self.token)


# What this process was sent, the newest last. A pool's process is not told when a loader is gone.
_received: dict[tuple[int, int], _SharedRecipe] = {}
_KEPT = 4


def _recipe_from_bytes(content: bytes, token: tuple[int, int]) -> _SharedRecipe:
    shared = _received.pop(token, None) or _SharedRecipe(pickle.loads(content), token)
    _received[token] = shared
    while len(_received) > _KEPT:
        del _received[next(iter(_received))]
    return shared


def _prepare(shared: _SharedRecipe, ticket: Ticket) -> PreparedVolume | bytes:
    """Runs in the executor."""
    if not hasattr(_local, "preparers"):
        _local.preparers = weakref.WeakKeyDictionary()
    preparers: weakref.WeakKeyDictionary[_SharedRecipe, Preparer] = _local.preparers
    if shared not in preparers:
        if threading.current_thread() is threading.main_thread():
            preparers[shared] = Preparer(shared.recipe, "inline")
        else:
            one_openmp_thread()
            preparers[shared] = Preparer(shared.recipe.for_thread(), "thread")
    volume = preparers[shared](ticket)
    return volume if shared.token[0] == os.getpid() else dumps(volume)


class ExecutorProducer(Producer):
    """Prepares volumes by ``executor.submit``; patches come back through the executor, in memory.

    An executor that breaks is given its outstanding volumes once more, one at a time, so that only the volume that
    breaks it again is reported as failed. The executor stays the user's: it is not shut down.
    """

    def __init__(self, recipe: Recipe, executor: Executor) -> None:
        self.num_workers = parallelism(executor)
        self._executor = executor
        self._recipe = _SharedRecipe(recipe, (os.getpid(), next(_tokens)))
        self._events: SimpleQueue[tuple[Assignment, Future[Any]] | None] = SimpleQueue()
        self._outstanding: dict[int, Future[Any]] = {}
        self._again: list[Assignment] = []

    def capacity(self) -> int:
        return 0 if self._again else 2 * self.num_workers - len(self._outstanding)

    def submit(self, assignment: Assignment) -> None:
        try:
            future = self._executor.submit(_prepare, self._recipe, assignment.ticket)
        except Exception as error:  # broken or shut down
            future = Future()
            future.set_exception(error)
        self._outstanding[assignment.number] = future
        future.add_done_callback(lambda future: self._events.put((assignment, future)))

    def wait(self) -> list[Event]:
        done = self._events.get()
        if done is None:
            return []
        assignment, future = done
        del self._outstanding[assignment.number]
        event = self._event(assignment, future)
        if self._again and not self._outstanding:
            self.submit(self._again[0])
        return [] if event is None else [event]

    def _event(self, assignment: Assignment, future: Future[Any]) -> Event | None:
        second_try = bool(self._again) and self._again[0].number == assignment.number and not self._outstanding
        try:
            volume = future.result()
        except (BrokenExecutor, CancelledError) as error:
            if not second_try:
                self._again.append(assignment)
                return None
            self._again.pop(0)
            return Failed(assignment.number, Failure.of(error), type(self._executor).__name__)
        except (Exception, SystemExit) as error:
            event: Event = Failed(assignment.number, Failure.of(error), type(self._executor).__name__)
        else:
            event = InMemory(assignment.number, pickle.loads(volume) if isinstance(volume, bytes) else volume)
        if second_try:
            self._again.pop(0)
        return event

    def grant(self, number: int, slots: Sequence[int]) -> None:
        raise RuntimeError("an executor has nobody waiting for slots.")

    def wake(self) -> None:
        self._events.put(None)

    def close(self) -> None:
        for future in list(self._outstanding.values()):
            future.cancel()
