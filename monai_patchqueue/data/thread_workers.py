# SPDX-License-Identifier: Apache-2.0
"""A DataLoader's workers as threads, each with a dataset, transforms and worker info of its own."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from itertools import count, cycle
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from monai.data.utils import worker_init_fn as monai_worker_init_fn
from torch.utils.data import DataLoader
from torch.utils.data._utils import pin_memory as torch_pinning
from torch.utils.data._utils import worker as torch_worker
from torch.utils.data.dataloader import _DatasetKind

from ..queue.exiting import end_at_exit, interrupt
from ..queue.producers.threads import one_openmp_thread
from ..queue.seeding import Reseeder
from ..queue.thread_copies import copy_for_thread
from ..queue.traces import TraceNames, transform_ids
from .feeds import Result

__all__ = ["ThreadWorkersFeed"]

# As torch's DataLoader has it.
_PREFETCH_FACTOR = 2

_info_of_thread: ContextVar[torch_worker.WorkerInfo | None] = ContextVar("patchqueue_worker_info", default=None)


def _forget_worker_info() -> None:
    """A process that a worker thread has forked is no worker thread."""
    _info_of_thread.set(None)


def _get_worker_info() -> Any:
    # Names of torch's module, where this will run.
    return _thread_worker_info.get() or _worker_info  # type: ignore[name-defined]  # noqa: F821


def _let_threads_have_worker_info() -> None:
    """Let ``torch.utils.data.get_worker_info`` answer for the thread that asks.

    torch keeps one answer for the whole process, and datasets have imported the function by name: so it is its code
    that is replaced, by one that asks for the thread's own first.
    """
    if not hasattr(torch_worker, "_thread_worker_info"):
        torch_worker._thread_worker_info = _info_of_thread  # type: ignore[attr-defined]
        torch_worker.get_worker_info.__code__ = _get_worker_info.__code__
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_forget_worker_info)


class _ThreadWorker:
    """One thread, which fetches the batches that it is told to, in order."""

    def __init__(self, name: str, run: Callable[[_ThreadWorker], None]) -> None:
        self.todo: SimpleQueue[tuple[int, Any] | None] = SimpleQueue()
        self.done: SimpleQueue[Result] = SimpleQueue()
        self.stopped = False
        self.interrupted = False
        self.thread = threading.Thread(target=run, args=(self,), name=name, daemon=True)
        end_at_exit(self)
        self.thread.start()

    def stop(self) -> None:
        """Let the thread end once it comes back from the batch that it is making."""
        self.stopped = True
        self.todo.put(None)
        self.done.put(Result(is_end=True))

    def abandon(self) -> None:
        """Stop, and interrupt the thread."""
        self.stop()
        if self.thread.is_alive():
            self.interrupted = True
            interrupt(self.thread)


class ThreadWorkersFeed:
    """Makes a loader's batches in threads, in the order of its sampler.

    Batches go to the workers in turns, as with torch's DataLoader. Random state is set for each batch from the loader's
    generator and the batch's number, so that it does not matter how many workers there are; for iterable datasets, and
    for a ``worker_init_fn`` of the user's own, once per worker.

    Args:
        loader: whose dataset, sampler, ``collate_fn`` and other arguments are used; its own workers are not started.
        buffer_size: batches that are made ahead, besides ``prefetch_factor`` for each worker.
    """

    def __init__(self, loader: DataLoader[Any], buffer_size: int) -> None:
        _let_threads_have_worker_info()
        self._timeout = loader.timeout or None
        self._is_iterable = loader._dataset_kind == _DatasetKind.Iterable
        self._seed = int(torch.empty((), dtype=torch.int64).random_(generator=loader.generator).item())
        self._init_fn = None if loader.worker_init_fn is monai_worker_init_fn else loader.worker_init_fn
        self._pin = loader.pin_memory and torch.cuda.is_available()
        self._originals = transform_ids(loader.dataset, loader.collate_fn)
        self._numbers = count()
        sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._indices: Iterator[Any] = iter(sampler)
        self._ended: set[int] = set()
        self._tasks: deque[int] = deque()
        self._turns = cycle(range(loader.num_workers))
        mains = [self._main(index, loader) for index in range(loader.num_workers)]
        self._workers = [_ThreadWorker(f"patchqueue-loader-{index}", main) for index, main in enumerate(mains)]
        try:
            for _ in range(loader.num_workers * (loader.prefetch_factor or _PREFETCH_FACTOR) + buffer_size):
                self._give_out_a_task()
        except BaseException:  # the sampler's
            self.stop()
            raise

    def get(self) -> Any:
        """The next batch.

        Raises:
            RuntimeError: none came within the loader's ``timeout``.
        """
        while self._tasks:
            index = self._tasks.popleft()
            try:
                result = self._workers[index].done.get(timeout=self._timeout)
            except Empty:
                raise RuntimeError(f"no batch was made within timeout={self._timeout} s.") from None
            if result.is_end:
                self._ended.add(index)
            self._give_out_a_task()
            if not result.is_end:
                return result.unwrap()
        raise StopIteration

    def stop(self) -> None:
        """Let the threads end as soon as they come back from the batch that they are making."""
        for worker in self._workers:
            worker.stop()

    def _give_out_a_task(self) -> None:
        if len(self._ended) == len(self._workers):
            return
        try:
            task = next(self._numbers), next(self._indices)
        except StopIteration:
            return
        index = next(index for index in self._turns if index not in self._ended)
        self._workers[index].todo.put(task)
        self._tasks.append(index)

    def _main(self, index: int, loader: DataLoader[Any]) -> Callable[[_ThreadWorker], None]:
        """What a worker does; refers to nothing of the consumer's."""
        dataset, collate_fn = copy_for_thread(loader.dataset, loader.collate_fn)
        names = TraceNames(transform_ids(dataset, collate_fn), self._originals)
        info = torch_worker.WorkerInfo(
            id=index, num_workers=loader.num_workers, seed=self._seed + index, dataset=dataset
        )
        fetching = (loader._dataset_kind, dataset, loader.batch_sampler is not None, collate_fn, loader.drop_last)
        init_fn, seed, is_iterable, pin = self._init_fn, self._seed, self._is_iterable, self._pin

        def run(worker: _ThreadWorker) -> None:
            one_openmp_thread()
            _info_of_thread.set(info)
            reseed = Reseeder(dataset, collate_fn)
            failure: BaseException | None = None
            try:
                reseed(np.random.SeedSequence((seed, 0, index)))
                if init_fn is not None:
                    init_fn(index)
                fetcher = _DatasetKind.create_fetcher(*fetching)  # type: ignore[no-untyped-call]
            except BaseException as error:
                failure = error
            while (task := worker.todo.get()) is not None and not worker.stopped:
                number, indices = task
                try:
                    if failure is not None:
                        raise failure
                    if init_fn is None and not is_iterable:
                        reseed(np.random.SeedSequence((seed, 1, number)))
                    batch = fetcher.fetch(indices)
                    names.rename(batch)
                    if pin:
                        batch = torch_pinning.pin_memory(batch)  # type: ignore[no-untyped-call]
                    worker.done.put(Result(batch))
                    del batch
                except StopIteration:
                    worker.done.put(Result(is_end=True))
                except BaseException as error:
                    worker.done.put(Result(error=error))

        return run
