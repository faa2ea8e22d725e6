# SPDX-License-Identifier: Apache-2.0
"""A queue that runs, or does not yet: what the sessions of all its public faces have in common."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..queue.cpus import available_cpus
from ..queue.memory import available_memory, ranks_on_this_host
from ..queue.record import slab_specs
from ..queue.recorder import Recorder
from ..queue.runner import Batch, Runner
from ..queue.schedule import Plan, Ticket
from ..queue.settings import LoaderSettings
from ..queue.slab import SlabLayout
from ..queue.stats import QueueStats
from ..queue.worker import PreparedVolume
from .launch import launch, prepare_first
from .options import QueueOptions
from .sizing import Sizing
from .volumes import file_suffix, sample_count_holder, stages_after_sampling, storable_stages

__all__ = ["BatchIterator", "RunningQueue"]


class RunningQueue(ABC):
    """Workers, slab and figures of a queue. Workers start with the first epoch, or when told to."""

    def __init__(self, options: QueueOptions, sizing: Sizing) -> None:
        self.options = options
        self.epoch = 0
        self.batches = 0  # handed out in this epoch
        self.seed = torch.initial_seed() if options.seed is None else options.seed
        self._sizing = sizing
        self._recorder = Recorder()
        self._runner: Runner | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._prepared: tuple[Ticket, PreparedVolume] | None = None
        self._pid = os.getpid()
        self._iterators = 0
        self._fresh = True

    @abstractmethod
    def anew(self) -> RunningQueue:
        """One of its own with the same arguments, at the beginning."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch."""

    @abstractmethod
    def iterate(self) -> Iterator[Any]:
        """Begin the next epoch; an iterator over its batches. An older iterator ends with an error."""

    @abstractmethod
    def next_batch(self, iterator: int) -> Any:
        """A batch for the ``iterator``-th iterator.

        Raises:
            RuntimeError: for an iterator that is not the newest.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position, and what of the arguments decides the batches, as plain values."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the position of ``state``."""

    @abstractmethod
    def set_epoch(self, epoch: int) -> None:
        """Name the next epoch."""

    @abstractmethod
    def _plan_ahead(self) -> Plan:
        """The plan that the next epoch will probably have."""

    def _launch(self, prepared: tuple[Ticket, PreparedVolume] | None) -> tuple[Runner, weakref.finalize[..., Any]]:
        return launch(self, self.options, self._sizing, seed=self.seed, recorder=self._recorder, prepared=prepared)

    def start(self) -> Runner:
        """Start the workers, if they are not running."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this loader was made in another process (a DataLoader's worker?): it has workers of its own and "
                "runs in the process that made it."
            )
        if self._runner is None:
            prepared, self._prepared = self._prepared, None
            self._runner, self._finalizer = self._launch(prepared)
        return self._runner

    def stop(self) -> None:
        """End workers and give the slab back; the next epoch starts them again."""
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None
        self._runner = None

    def _runner_for(self, iterator: int) -> Runner:
        if iterator != self._iterators:
            raise RuntimeError(
                "a newer iterator of this loader has been made: its epoch has begun, and this one's has ended. One "
                "loader runs one epoch at a time; make a second loader to iterate twice at once."
            )
        if os.getpid() != self._pid:
            raise RuntimeError("this loader runs in the process that made it.")
        if self._runner is None:
            raise RuntimeError("the loader was closed during this epoch.")
        return self._runner

    def _hand_out(self, batch: Batch, requested: float) -> Any:
        self._fresh = False
        if batch.handover is not None:
            batch.handover()
        self.batches += 1
        self._recorder.delivered(requested, batch.volumes, batch.new, batch.age)
        return batch.content

    def probe(self) -> SlabLayout:
        """The slab's layout; where no volume has been prepared yet, the first one is, and used later."""
        queue = self._runner.queue if self._runner else None
        if queue is not None and queue.info is not None:
            return queue.info.slab.layout
        if self._prepared is None:
            self._prepared = prepare_first(self.options, self.seed, self._plan_ahead())
        layout = SlabLayout(1, slab_specs(self._prepared[1].patches[0]))
        return SlabLayout(self._sizing.slots(self._sizing.queue_length(layout.patch_nbytes)), layout.keys)

    def memory_bytes(self) -> int:
        """Bytes of the slab and of the batches in flight."""
        layout = self.probe()
        return layout.nbytes + 3 * self.options.batch_size * layout.patch_nbytes

    def stats(self) -> QueueStats:
        """The figures now."""
        queue = self._runner.queue if self._runner else None
        info = queue.info if queue else None
        return self._recorder.stats(
            epoch=self.epoch,
            ready=self._ready(),
            queue_length=queue.queue_length if queue else 0,
            slab_bytes=info.slab.layout.nbytes if info else 0,
            num_workers=self._num_workers,
            workers_apart=self.options.worker_type == "process" and self._num_workers > 0,
        )

    @property
    def _num_workers(self) -> int:
        return self._sizing.workers if self.options.executor else self.options.num_workers

    def settings(self) -> LoaderSettings:
        """What decides the rate."""
        options, sizing, stats = self.options, self._sizing, self.stats()
        queue = self._runner.queue if self._runner else None
        samples = float(options.counts[options.counts > 0].mean())
        patch_transform = ("patch_transform",) if options.patch_transform is not None else ()
        return LoaderSettings(
            num_workers=self._num_workers,
            samples_per_volume=samples,
            batch_size=options.batch_size,
            queue_length=stats.queue_length or sizing.wished_length,
            worker_type=options.worker_type,
            persistent_workers=options.persistent_workers or options.executor is not None,
            repeats=options.repeats,
            volumes=max(round(sizing.patches / samples), 1),
            fixed_samples=sample_count_holder(options.dataset) is None,
            storable=storable_stages(options.dataset),
            after_sampling=stages_after_sampling(options.dataset) + patch_transform,
            item_transform=options.item_transform,
            patch_transform=options.patch_transform,
            suffix=file_suffix(options.dataset),
            cpus=available_cpus() / ranks_on_this_host(),
            memory=available_memory() / ranks_on_this_host() + stats.slab_bytes,
            patch_nbytes=queue.info.slab.layout.patch_nbytes if queue and queue.info else 0,
        )

    def _ready(self) -> int:
        """Patches that are there to be drawn."""
        return self._runner.queue.ready_patches if self._runner else 0


class BatchIterator:
    """One epoch's batches."""

    def __init__(self, session: RunningQueue, number: int) -> None:
        self._session = session
        self._number = number
        self._over = False

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Any:
        if self._over:
            raise StopIteration
        try:
            return self._session.next_batch(self._number)
        except StopIteration:
            self._over = True
            raise

    def __len__(self) -> int:
        return len(self._session)
