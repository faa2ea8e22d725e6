# SPDX-License-Identifier: Apache-2.0
"""What turns the queue's crank: the consumer's own thread, or one in the background that works ahead."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .assemble import Assembler
from .epoch import DrawnPatch
from .errors import VolumeFailedError
from .patch_queue import PatchQueue
from .producers import Producer
from .producers.threads import one_openmp_thread
from .schedule import Plan

__all__ = ["BackgroundRunner", "Batch", "InlineRunner", "Runner"]


class Batch(NamedTuple):
    """A finished batch, with the number of its patches that come from each volume, how many were drawn first here, and
    for how many batches all of them together had been in a random queue.

    ``handover`` is to be called by the consumer's thread before it uses the batch.
    """

    content: Any
    volumes: Counter[int]
    new: int
    age: int
    handover: Callable[[], None] | None


class Runner(ABC):
    """Runs a queue for one consumer at a time."""

    def __init__(self, queue: PatchQueue, producer: Producer, assembler: Assembler) -> None:
        self.queue = queue
        self._producer = producer
        self._assembler = assembler
        self._plan: Plan | None = None
        self._batches = 0

    def _assemble(self, patches: list[DrawnPatch]) -> Batch:
        if self.queue.info is None or self._plan is None:
            raise RuntimeError("a batch is assembled before an epoch is open.")
        try:
            content, handover = self._assembler(self.queue.info, patches, self._plan.epoch, self._batches)
        except StopIteration as error:  # would end the epoch as if all were well
            raise RuntimeError(f"a transform or collate_fn raised StopIteration({error}).") from error
        self.queue.drawn(patches)
        self._batches += 1
        volumes = Counter(patch.ticket.volume for patch in patches)
        new, age = sum(patch.draw.first for patch in patches), sum(patch.draw.age for patch in patches)
        return Batch(content, volumes, new, age, handover)

    @abstractmethod
    def open(
        self,
        plan: Plan,
        following: Callable[[], Plan | None],
        batches: int = 0,
        replaced: Mapping[int, int] | None = None,
    ) -> None:
        """Begin an epoch, after ``batches`` batches and replacements of an earlier run.

        ``following`` gives the plan that the next epoch will probably have.
        """

    @abstractmethod
    def next(self, timeout: float | None = None) -> Batch | None:
        """The next batch; ``None`` at the end of the epoch.

        Raises:
            TimeoutError: no batch within ``timeout`` seconds.
        """

    @abstractmethod
    def wait_until(self, reached: Callable[[], bool], timeout: float) -> bool:
        """Prepare volumes until ``reached()``, but not for longer than ``timeout`` seconds; whether it has.

        Raises what a volume has failed with.
        """

    def wake(self) -> None:
        """Look again whether a batch can be drawn; from any thread."""
        self._producer.wake()

    @abstractmethod
    def close(self) -> None:
        """Stop everything; does not wait for volumes in preparation."""


class InlineRunner(Runner):
    """Prepares what is needed when it is needed, in the consumer's thread."""

    def open(
        self,
        plan: Plan,
        following: Callable[[], Plan | None],
        batches: int = 0,
        replaced: Mapping[int, int] | None = None,
    ) -> None:
        self._plan, self._batches = plan, batches
        self.queue.open(plan, None, batches, replaced)

    def next(self, timeout: float | None = None) -> Batch | None:
        while True:
            try:
                patches = self.queue.next_batch()
            except VolumeFailedError as failed:
                raise failed.error from None
            if patches is not None:
                return self._assemble(patches) if patches else None
            self._prepare()

    def wait_until(self, reached: Callable[[], bool], timeout: float) -> bool:
        end = time.monotonic() + timeout
        while not reached():
            if time.monotonic() >= end:
                return False
            try:
                self.queue.next_batch()
            except VolumeFailedError as failed:
                raise failed.error from None
            self._prepare()
        return True

    def _prepare(self) -> None:
        self.queue.fill(limit=1)
        for event in self._producer.wait():
            self.queue.handle(event)

    def close(self) -> None:
        self._producer.close()


class BackgroundRunner(Runner):
    """One thread follows the workers and assembles the next batch while the consumer is busy with the last."""

    def __init__(self, queue: PatchQueue, producer: Producer, assembler: Assembler) -> None:
        super().__init__(queue, producer, assembler)
        self._changed = threading.Condition()
        self._ahead: Batch | None = None
        self._over = False  # the consumer has had its epoch's last batch; one that is ahead is the next epoch's
        self._error: BaseException | None = None
        self._opening: tuple[Plan, Plan | None, int, Mapping[int, int] | None] | None = None
        self._guessed = False  # the plan is of an epoch that nobody has asked for yet
        self._upcoming: Plan | None = None  # of the epoch that probably follows
        self._expected: Plan | None = None  # the same, where the queue is still to hear of it
        self._broken: BaseException | None = None
        self._handed_out = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="patchqueue", daemon=True)
        self._thread.start()

    def open(
        self,
        plan: Plan,
        following: Callable[[], Plan | None],
        batches: int = 0,
        replaced: Mapping[int, int] | None = None,
    ) -> None:
        upcoming = following()
        with self._changed:
            if self._broken is not None:
                raise self._broken
            untouched = self._plan == plan and not self._handed_out and not self._error and not batches
            if untouched and not self.queue.has_failures:
                self._expected = upcoming
            else:
                self._begin(plan, upcoming, batches, replaced)
            self._over, self._guessed, self._upcoming = False, False, upcoming
        self._producer.wake()

    def _begin(
        self, plan: Plan, upcoming: Plan | None, batches: int = 0, replaced: Mapping[int, int] | None = None
    ) -> None:
        self._plan, self._handed_out, self._error = plan, False, None
        self._opening, self._expected = (plan, upcoming, batches, replaced), None
        self._ahead = None

    def next(self, timeout: float | None = None) -> Batch | None:
        with self._changed:
            while not self._changed.wait_for(self._decided, 3600.0 if timeout is None else timeout):
                if timeout is not None:
                    raise TimeoutError(f"no batch within timeout={timeout} s: the workers are still preparing volumes.")
            if self._closed:
                raise RuntimeError("the loader was closed.")
            if self._over:
                return None
            batch, self._ahead = self._ahead, None
            if batch is None and self._error is not None:
                raise self._error
            self._handed_out = True
        self._producer.wake()
        return batch

    def wait_until(self, reached: Callable[[], bool], timeout: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: reached() or self._closed or self._error is not None, timeout)
            if self._closed:
                raise RuntimeError("the loader was closed.")
            if self._error is not None:
                raise self._error
            return reached()

    def _decided(self) -> bool:
        return self._closed or self._over or self._ahead is not None or self._error is not None

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._producer.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        one_openmp_thread()
        try:
            while not self._closed:
                self._turn()
        except BaseException as error:
            with self._changed:
                self._error = self._broken = error
                self._changed.notify_all()
        finally:
            self._producer.close()

    def _turn(self) -> None:
        with self._changed:
            opening, self._opening = self._opening, None
            if self._guessed and self.queue.has_failures:
                opening = self._plan = None  # what has failed ahead is tried again when its epoch begins
            expected, self._expected = self._expected, None
            if opening is not None:
                self._batches = opening[2]
                self.queue.open(*opening)
            if expected is not None:
                self.queue.expect(expected)
            ended = self._over and not self._guessed
            idle = ended or self._ahead is not None or self._error is not None or self._plan is None
        self.queue.fill()
        if not idle and self._try_batch():
            return
        for event in self._producer.wait():
            self.queue.handle(event)
        with self._changed:
            self._changed.notify_all()

    def _try_batch(self) -> bool:
        """Assemble the next batch if its patches are there; whether anything came of it."""
        batch, error = None, None
        try:
            patches = self.queue.next_batch()
            if patches is None:
                return False
            batch = self._assemble(patches) if patches else None
        except VolumeFailedError as failed:
            error = failed.error
        except Exception as failed:  # a user's collate_fn or transform
            error = failed
        with self._changed:
            if self._opening is None:
                self._ahead, self._error = batch, error
                if batch is None and error is None:
                    self._end()
                self._changed.notify_all()
        return True

    def _end(self) -> None:
        """The epoch is over. The first batch of the one that probably follows is assembled before it is asked for."""
        self._over, self._guessed = True, self._upcoming is not None
        if self._upcoming is not None:
            self._begin(self._upcoming, None)
            self._upcoming = None
