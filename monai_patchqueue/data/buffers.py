# SPDX-License-Identifier: Apache-2.0
"""Loaders that run any source in the background: a thread, or a process."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from multiprocessing.context import BaseContext
from typing import Any

from .arguments import positive, start_context
from .feeds import BufferedIterator, BufferedLoader, ThreadFeed, lock_of
from .process_feed import ProcessFeed

__all__ = ["ProcessBufferLoader", "ThreadBufferLoader", "iterate_buffered"]


class _BufferLoader(BufferedLoader):
    src: Iterable[Any]
    buffer_size: int
    repeats: int

    def __init__(self, src: Iterable[Any], buffer_size: int, repeats: int) -> None:
        if not hasattr(src, "__iter__") and not hasattr(src, "__getitem__"):
            raise TypeError(f"src is a {type(src).__name__}; expected something to iterate over.")
        positive("buffer_size", buffer_size)
        positive("repeats", repeats)
        self.src = src
        self.buffer_size = buffer_size
        self.repeats = repeats
        self._iterators = weakref.WeakSet()

    def __len__(self) -> int:
        length: int = len(self.src)  # type: ignore[arg-type]
        return length * self.repeats


class ThreadBufferLoader(_BufferLoader):
    """Runs a source in a background thread and hands its items over through a bounded buffer.

    What MONAI's ``ThreadBuffer`` does, and further: an exception of the source's is raised where the items are used,
    with its own traceback; leaving a loop early and iterating again starts clean; :meth:`close` does not wait for the
    source; nobody polls; several iterators may be open at once. No two threads work in one source at the same time: an
    iterator that was left while its item was being made lets go of the source once that is done.

    Args:
        src: anything to iterate over, such as a ``DataLoader``. An iterator is gone on with by each iteration.
        buffer_size: items that are kept ready; one more is made meanwhile.
        repeats: how often each item is given, the very same object each time, while the next one is made.
        timeout: accepted for the sake of ``ThreadBuffer``'s users; nothing here depends on it.

    Raises:
        TypeError: a source that cannot be iterated over, numbers that are no whole numbers.
        ValueError: numbers below 1.

    Example:
        >>> import numpy as np
        >>> from monai.data import DataLoader, Dataset
        >>> from monai_patchqueue import ThreadBufferLoader
        >>> volumes = [{"image": np.full((1, 8, 8), n)} for n in range(4)]
        >>> loader = ThreadBufferLoader(DataLoader(Dataset(volumes), batch_size=2), repeats=2)
        >>> len(loader), [batch["image"][:, 0, 0, 0].tolist() for batch in loader]
        (4, [[0, 1], [0, 1], [2, 3], [2, 3]])
    """

    def __init__(
        self, src: Iterable[Any], buffer_size: int = 1, repeats: int = 1, timeout: float | None = None
    ) -> None:
        super().__init__(src, buffer_size, repeats)

    def __iter__(self) -> BufferedIterator[Any]:
        lock = lock_of(self.src)
        with lock:
            iterator = iter(self.src)  # here, as it may draw from the global generators, or fork
        return self._open(ThreadFeed(iterator, lock, self.buffer_size), self.repeats)


class ProcessBufferLoader(_BufferLoader):
    """Runs a source in a background process; its tensors and arrays come back by shared memory, without being copied.

    For sources that keep the interpreter busy, from which a thread would take turns with training. An item belongs to
    whoever it is given to: its memory is written to again only when nothing refers to it any more. ``MetaTensor`` keep
    their metadata.

    Each iteration starts a process, which has the source as it is then, and ends it. It draws a seed from torch's
    global generator, as torch's ``DataLoader`` does, from which all random state that the source has over there is set:
    iterations differ, and the same seed of torch's gives the same items. Processes that the source starts, such as a
    ``DataLoader``'s workers, end with it.

    Args:
        src: anything to iterate over, such as a ``DataLoader``.
        buffer_size: items that are kept ready; one more is made meanwhile.
        repeats: how often each item is given, the very same object each time, while the next one is made.
        multiprocessing_context: ``"fork"`` (default on Linux), ``"forkserver"``, ``"spawn"`` (default elsewhere), or a
            context. The latter two need a source that can be pickled.

    Raises:
        TypeError: a source that cannot be iterated over or, when iterating, sent to the process.
        ValueError: numbers below 1.

    Iterating raises the source's exception, with the process's traceback in its message, and a ``WorkerDiedError``
    that names exit code or signal if the process has ended otherwise.

    Example:
        >>> import numpy as np
        >>> from monai.data import DataLoader, Dataset
        >>> from monai_patchqueue import ProcessBufferLoader
        >>> volumes = [{"image": np.full((1, 64, 64), n)} for n in range(4)]
        >>> with ProcessBufferLoader(DataLoader(Dataset(volumes), batch_size=2)) as loader:
        ...     print([batch["image"][:, 0, 0, 0].tolist() for batch in loader])
        [[0, 1], [2, 3]]
    """

    def __init__(
        self,
        src: Iterable[Any],
        buffer_size: int = 1,
        repeats: int = 1,
        multiprocessing_context: str | BaseContext | None = None,
    ) -> None:
        super().__init__(src, buffer_size, repeats)
        self._context = start_context(multiprocessing_context)
        self.multiprocessing_context = multiprocessing_context

    def __iter__(self) -> BufferedIterator[Any]:
        return self._open(ProcessFeed(self.src, self.buffer_size, self._context), self.repeats)


def iterate_buffered(
    src: Iterable[Any], buffer_size: int = 1, timeout: float | None = None, repeats: int = 1
) -> BufferedIterator[Any]:
    """Iterate over a source that runs in a background thread, as MONAI's ``buffer_iterator`` does.

    Args:
        src: anything to iterate over.
        buffer_size: items that are kept ready; one more is made meanwhile.
        timeout: accepted for the sake of ``buffer_iterator``'s users; nothing here depends on it.
        repeats: how often each item is given, the very same object each time.

    Returns:
        An iterator; its ``close()``, or ``stop()``, ends it at once, whatever the source is doing.

    Example:
        >>> list(iterate_buffered(range(3), buffer_size=2, repeats=2))
        [0, 0, 1, 1, 2, 2]
    """
    return iter(ThreadBufferLoader(src, buffer_size, repeats))
