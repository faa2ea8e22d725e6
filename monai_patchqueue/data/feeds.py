# SPDX-License-Identifier: Apache-2.0
"""Iterators over items that are made in the background, and what such loaders have in common."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from typing_extensions import Self

from ..queue.exiting import end_at_exit, interrupt

__all__ = ["BufferedIterator", "BufferedLoader", "Feed", "Result", "ThreadFeed", "lock_of"]

T = TypeVar("T")


class Feed(Protocol):
    """Where a :class:`BufferedIterator` gets items from. It must not refer to the iterator."""

    def get(self) -> Any:
        """The next item; ``StopIteration`` after the last one, or once stopped."""

    def stop(self) -> None:
        """Make no more items, without waiting for one that is being made. May be called from anywhere, and again."""


class BufferedIterator(Generic[T]):
    """One iteration over a source.

    Args:
        feed: where items come from; stopped when the iterator ends, is closed, or is given up.
        repeats: how often each item is given: the very same object each time.
    """

    def __init__(self, feed: Feed, repeats: int) -> None:
        self._feed: Feed | None = feed
        self._repeats = repeats
        self._again: list[T] = []
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, feed.stop)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._again:
            return self._again.pop()
        if self._feed is None:
            raise StopIteration
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this iterator belongs to the process that made it: what fills its buffer does not run here. Iterate "
                "over the loader anew."
            )
        try:
            item: T = self._feed.get()
        except Exception:
            self.close()
            raise
        self._again = [item] * (self._repeats - 1)
        return item

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._feed is None

    def close(self) -> None:
        """End the iteration at once, whatever the source is doing."""
        self._feed, self._again = None, []
        self._finalizer()

    def stop(self) -> None:
        """The same as :meth:`close`, under the name that MONAI's ``ThreadBuffer`` has for it."""
        self.close()


class BufferedLoader:
    """A loader whose iterators can be closed together; a copy, and what comes out of a pickle, has its own."""

    _iterators: weakref.WeakSet[BufferedIterator[Any]]

    def _open(self, feed: Feed, repeats: int) -> BufferedIterator[Any]:
        iterator: BufferedIterator[Any] = BufferedIterator(feed, repeats)
        self._iterators.add(iterator)
        return iterator

    def close(self) -> None:
        """End all iterations at once, whatever the source is doing; iterating again starts anew."""
        for iterator in list(self._iterators):
            iterator.close()

    def stop(self) -> None:
        """The same as :meth:`close`, under the name that MONAI's ``ThreadBuffer`` has for it."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_iterators"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _iterators=weakref.WeakSet())


class Result(NamedTuple):
    """What a thread has made: an item, an error, or the end."""

    item: Any = None
    error: BaseException | None = None
    is_end: bool = False

    def unwrap(self) -> Any:
        """The item, or the original exception, with its traceback."""
        if self.is_end:
            raise StopIteration
        if self.error is not None:
            raise self.error
        return self.item


class ThreadFeed:
    """Runs an iterator in a thread, ``buffer_size`` items ahead and one in hand.

    Threads and consumer talk through ``SimpleQueue`` alone: nobody polls, and :meth:`stop` may even be called by the
    garbage collector in the midst of any of these calls.

    Args:
        iterator: of the source.
        lock: held while the iterator works, see :func:`lock_of`.
        buffer_size: items that wait to be taken.
    """

    def __init__(self, iterator: Iterator[Any], lock: AbstractContextManager[Any], buffer_size: int) -> None:
        self._made: SimpleQueue[Result] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(buffer_size):
            self._room.put(None)
        self._stopped = False
        self.interrupted = False
        self.thread = threading.Thread(target=self._run, args=([iterator], lock), name="patchqueue-buffer", daemon=True)
        end_at_exit(self)
        self.thread.start()

    def get(self) -> Any:
        """The next item."""
        result = self._made.get()
        self._room.put(None)
        return result.unwrap()

    def stop(self) -> None:
        """Let the thread end as soon as the source comes back from what it is doing."""
        self._stopped = True
        self._room.put(None)
        self._made.put(Result(is_end=True))

    def abandon(self) -> None:
        """Stop, and interrupt the source."""
        self.stop()
        if self.thread.is_alive():
            self.interrupted = True
            interrupt(self.thread)

    def _run(self, source: list[Iterator[Any]], lock: AbstractContextManager[Any]) -> None:
        try:
            while True:
                with lock:
                    if self._stopped:
                        return
                    item = next(source[0])
                self._room.get()
                self._made.put(Result(item))
                del item
        except StopIteration:
            self._made.put(Result(is_end=True))
        except BaseException as error:
            self._made.put(Result(error=error))
        finally:
            with lock:
                source.clear()  # ends a generator, or a DataLoader's workers


_locks: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locks.clear)  # no thread comes along that would give them back


def lock_of(source: Any) -> AbstractContextManager[Any]:
    """A lock for a source that several iterations, and one that was left while its item was made, may use at once.

    A dataset's transforms keep what they have drawn for an item in themselves, and a generator cannot be entered twice:
    no two threads may work in one source at the same time.

    Returns:
        The same lock for the same source; none for lists and their like, that need none.
    """
    try:
        return _locks.setdefault(source, threading.Lock())
    except TypeError:  # takes no weak reference, or has no hash
        return nullcontext()
