# SPDX-License-Identifier: Apache-2.0
"""A source that is run in a process of its own."""

from __future__ import annotations

import atexit
import multiprocessing.connection as mpc
import multiprocessing.util  # noqa: F401 (its exit handler, which would wait for our processes, is to be registered before ours)
import os
import pickle
import signal
import weakref
from collections.abc import Generator, Iterable
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch

from ..queue.child import SAFETY, describe_exit, hang_up, start_child
from ..queue.errors import Failure, WorkerDiedError
from ..queue.handover import Parcel, Receiver, Sender
from ..queue.seeding import Reseeder, seed_globals
from ..queue.slab import HAS_MEMFD
from ..queue.traces import TraceNames, transform_ids

__all__ = ["ProcessFeed"]

_alive: weakref.WeakSet[ProcessFeed] = weakref.WeakSet()


@atexit.register
def _end_processes() -> None:
    for feed in list(_alive):
        feed.stop()


class ProcessFeed:
    """Runs a source in a process, ``buffer_size`` items ahead and one in hand.

    The process leads a group of its own, to which workers of the source's belong, and which ends with it.

    Args:
        source: what is iterated over there.
        buffer_size: items that wait to be taken.
        context: how the process is started.
        memfd: use ``memfd_create``; the default where there is one.
    """

    def __init__(self, source: Iterable[Any], buffer_size: int, context: BaseContext, memfd: bool = HAS_MEMFD) -> None:
        self._name = type(source).__name__
        self._stopped = False
        self._pid = os.getpid()
        self._memfd = memfd
        if not memfd:
            resource_tracker.ensure_running()  # for both processes the same
        seed = int(torch.empty((), dtype=torch.int64).random_().item())  # as torch's DataLoader draws its own
        self._process, self._connection = start_child(
            context,
            _produce,
            (source, buffer_size, seed, transform_ids(source), memfd),
            name="patchqueue-buffer",
            sent=source,
            instead="ThreadBufferLoader",
            own_group=True,
        )
        self._receiver = Receiver(self._connection, keep=buffer_size + 2)
        _alive.add(self)

    def get(self) -> Any:
        """The next item.

        Raises:
            WorkerDiedError: the process has ended before the source had.
        """
        message = self._message()
        if isinstance(message, Parcel):
            item, acknowledgement = self._receiver.receive(message)
            with suppress(OSError):  # it has died: the next message says so
                self._connection.send_bytes(pickle.dumps(acknowledgement))
            return item
        if message is None:
            raise StopIteration
        raise message.exception_after(f"the source of the buffer, {self._name}, failed in process {self._process.pid}")

    def _message(self) -> Parcel | Failure | None:
        while not self._stopped:
            try:
                mpc.wait([self._connection, self._process.sentinel], SAFETY)
                if self._connection.poll():
                    message: Parcel | Failure | None = pickle.loads(self._connection.recv_bytes())
                    return message
                died = self._process.exitcode is not None
            except (EOFError, OSError, ValueError):  # the pipe's other end is closed, or ours was just now
                died = True
            if died and not self._stopped:
                self._process.join(1.0)
                raise WorkerDiedError(
                    f"the process that runs the buffer's source, {self._name}, {describe_exit(self._process.exitcode)} "
                    f"(pid {self._process.pid}). Its items are lost; iterate anew to start another one."
                )
        return None

    def stop(self) -> None:
        """End the process, whatever it is doing, and all that it has started."""
        if self._stopped or os.getpid() != self._pid:
            return
        self._stopped = True
        self._signal(signal.SIGTERM)
        self._process.join(1.0)
        if self._process.exitcode is None:
            self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            self._process.join(1.0)
        if not self._memfd:  # which would be gone by itself
            with suppress(EOFError, OSError):
                while self._connection.poll():
                    message = pickle.loads(self._connection.recv_bytes())
                    if isinstance(message, Parcel):
                        self._receiver.discard(message)
        hang_up(self._connection)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid or 0, number)
        except (AttributeError, OSError):  # no groups here, or it has not got its own yet
            self._process.terminate()


def _produce(
    connection: Connection[Any, Any],
    source: Iterable[Any],
    buffer_size: int,
    seed: int,
    originals: tuple[int, ...],
    memfd: bool,
) -> None:
    """Runs in the process."""
    torch.set_num_threads(1)
    sender = Sender(connection, memfd)
    items = _items(source, np.random.SeedSequence(seed), originals)
    room = buffer_size
    failure = None
    while failure is None:
        try:
            item = next(items)
        except StopIteration:
            break
        except BaseException as error:
            failure = Failure.of(error)
            break
        while not room or connection.poll():
            sender.acknowledged(pickle.loads(connection.recv_bytes()))
            room += 1
        try:
            sender.send(item)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            failure = Failure.of(error)
        room -= 1
        del item
    items.close()
    connection.send_bytes(_last_words(failure))
    while True:
        connection.recv_bytes()  # until the consumer closes the pipe: items may still lie in it


def _items(
    source: Iterable[Any], sequence: np.random.SeedSequence, originals: tuple[int, ...]
) -> Generator[Any, None, None]:
    seed_globals(sequence)
    Reseeder(source)(sequence.spawn(1)[0])
    names = TraceNames(transform_ids(source), originals)
    for item in source:
        names.rename(item)
        yield item


def _last_words(failure: Failure | None) -> bytes:
    try:
        return pickle.dumps(failure)
    except Exception:  # its class is known to this process alone
        if failure is None:
            raise
        return pickle.dumps(Failure(RuntimeError, f"{failure.kind.__name__}: {failure.message}", failure.trace))
