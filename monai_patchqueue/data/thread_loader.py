# SPDX-License-Identifier: Apache-2.0
"""A DataLoader that works in background threads."""

from __future__ import annotations

import weakref
from typing import Any

from monai.data import DataLoader, ThreadDataLoader
from torch.utils.data import Dataset

from .arguments import positive
from .feeds import BufferedIterator, BufferedLoader, ThreadFeed, lock_of
from .thread_workers import ThreadWorkersFeed

__all__ = ["PatchThreadDataLoader"]


class PatchThreadDataLoader(BufferedLoader, ThreadDataLoader):
    """MONAI's ``ThreadDataLoader``, with thread workers that do not share their transforms.

    A dataset in, batches out, made in the background; to ``isinstance`` a ``ThreadDataLoader``, and so a torch
    ``DataLoader``.

    With ``use_thread_workers=True``, ``num_workers`` threads make batches at the same time. Each has transforms of its
    own around the same data and caches, so that image and label always come from the same place, and worker info of its
    own, so that iterable datasets are sharded as between processes. The same seed of torch's gives the same batches
    with any number of threads; transforms that use the global generators are outside of that. Threads have the global
    generators and the number of torch's threads left alone.

    Otherwise ``num_workers`` processes, or none, make them as a ``DataLoader``'s do, and one
    thread takes them in advance.

    Args:
        dataset: map-style or iterable.
        buffer_size: batches that are kept ready, besides ``prefetch_factor`` (2) for each worker.
        buffer_timeout: accepted for the sake of ``ThreadDataLoader``'s users; nothing here depends on it.
        repeats: how often each batch is given, the very same object each time; ``len`` counts that.
        use_thread_workers: threads as workers, instead of processes.
        kwargs: other arguments of MONAI's ``DataLoader``. With thread workers, ``multiprocessing_context`` and
            ``persistent_workers`` mean nothing.

    Raises:
        TypeError: numbers that are no whole numbers; with thread workers, transforms that cannot be copied.
        ValueError: numbers below 1.

    Iterating raises a worker's exception itself, with its own traceback; leaving a loop early and iterating again
    starts clean; :meth:`close` does not wait for batches that are being made.

    Example:
        >>> import torch
        >>> from monai.data import Dataset
        >>> from monai_patchqueue import PatchThreadDataLoader, RandUniformPatchd
        >>> volumes = [{"image": torch.rand(1, 32, 32), "label": torch.rand(1, 32, 32)} for _ in range(4)]
        >>> crop = RandUniformPatchd(["image", "label"], spatial_size=16, num_samples=2)
        >>> loader = PatchThreadDataLoader(Dataset(volumes, crop), batch_size=2, num_workers=2, use_thread_workers=True)
        >>> [tuple(batch["image"].shape) for batch in loader]
        [(4, 1, 16, 16), (4, 1, 16, 16)]
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        buffer_size: int = 1,
        buffer_timeout: float = 0.01,
        repeats: int = 1,
        use_thread_workers: bool = False,
        **kwargs: Any,
    ) -> None:
        positive("buffer_size", buffer_size)
        positive("repeats", repeats)
        # MONAI's thread workers are processes to torch, and share all that processes do not.
        super().__init__(dataset, buffer_size, buffer_timeout, repeats, use_thread_workers=False, **kwargs)
        self.use_thread_workers = use_thread_workers
        self._iterators = weakref.WeakSet()

    def __iter__(self) -> BufferedIterator[Any]:
        if self.use_thread_workers and self.num_workers > 0:
            return self._open(ThreadWorkersFeed(self, self.buffer_size), self.repeats)
        lock = lock_of(self if self.num_workers else self.dataset)
        with lock:
            # Persistent workers serve one iteration at a time.
            busy = self.persistent_workers and not all(iterator.closed for iterator in self._iterators)
            batches = self._get_iterator() if busy else DataLoader.__iter__(self)
        return self._open(ThreadFeed(batches, lock, self.buffer_size), self.repeats)

    def __len__(self) -> int:
        length: int = super().__len__() * self.repeats
        return length
