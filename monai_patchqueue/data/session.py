# SPDX-License-Identifier: Apache-2.0
"""What stands behind a loader: from its arguments to a running queue, epoch after epoch."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..queue.assemble import Assembler
from ..queue.cpus import available_cpus
from ..queue.errors import Failure
from ..queue.memory import available_memory, ranks_on_this_host
from ..queue.orders import VolumeOrders
from ..queue.patch_queue import PatchQueue
from ..queue.producers import ExecutorProducer, InlineProducer, ProcessProducer, Producer, ThreadProducer
from ..queue.record import array_specs
from ..queue.recorder import Recorder
from ..queue.runner import BackgroundRunner, InlineRunner, Runner
from ..queue.schedule import EpochPlan, Ticket
from ..queue.settings import LoaderSettings
from ..queue.slab import SlabHandle, SlabLayout
from ..queue.stats import QueueStats
from ..queue.worker import PreparedVolume, Preparer, Recipe
from .options import QueueOptions
from .position import Position
from .sizing import Sizing
from .volumes import file_suffix, sample_count_holder, stages_after_sampling, volume_name

__all__ = ["QueueSession"]


class QueueSession:
    """Runs a queue for a loader or a dataset. Workers start with the first epoch, or when told to."""

    def __init__(self, options: QueueOptions) -> None:
        self.options = options
        self.epoch = 0
        self.batches = 0  # handed out in this epoch
        self.seed = torch.initial_seed() if options.seed is None else options.seed
        self._sizing = Sizing.of(options)
        self._orders = VolumeOrders(options.sampler, self.seed, len(options.counts))
        self._recorder = Recorder()
        self._runner: Runner | None = None
        self._plan: EpochPlan | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._resuming: Position | None = None  # where the next iterator begins, if not at the next epoch
        self._prepared: tuple[Ticket, PreparedVolume] | None = None
        self._pid = os.getpid()
        self._iterators = 0
        self._fresh = True

    def __len__(self) -> int:
        return self._sizing.num_batches

    @property
    def draws(self) -> int:
        """Draws in an epoch."""
        return self._sizing.draws

    def describe(self) -> str:
        """What a ``repr`` shows."""
        stats = self.stats()
        window = stats.queue_length or self._sizing.wished_length
        volumes = len(self.options.counts)
        return f"volumes={volumes}, window={window}, patches_per_epoch={self.draws}, drawn={stats.patches}"

    # -- running

    def start(self) -> Runner:
        """Start the workers, if they are not running."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this loader was made in another process (a DataLoader's worker?): it has workers of its own and "
                "runs in the process that made it."
            )
        if self._runner is None:
            options = self.options
            recipe = Recipe(options.dataset, self.seed, options.patch_transform, options.worker_init_fn).with_traced()
            handle = SlabHandle(
                shared=options.executor is None and options.num_workers > 0 and options.worker_type == "process"
            )
            producer = self._producer(recipe, handle)
            names = partial(volume_name, options.dataset)
            queue = PatchQueue(
                producer,
                handle,
                batch_size=options.batch_size,
                drop_last=options.drop_last,
                max_count=self._sizing.max_count,
                length=self._sizing.queue_length,
                volume_name=names,
                recorder=self._recorder,
                replace_failed=options.on_error == "replace",
            )
            if self._prepared is not None:
                queue.offer(*self._prepared)
                self._prepared = None
            assembler = Assembler(
                self.seed,
                item_transform=options.item_transform,
                batch_transform=options.batch_transform,
                collate_fn=options.collate_fn,
                pin_memory=options.pin_memory,
                device=options.device,
                volume_name=names,
                recorder=self._recorder,
            )
            kind = InlineRunner if isinstance(producer, InlineProducer) else BackgroundRunner
            self._runner = kind(queue, producer, assembler)
            self._finalizer = weakref.finalize(self, _close, self._runner, handle, self._pid)
        return self._runner

    def _producer(self, recipe: Recipe, handle: SlabHandle) -> Producer:
        options = self.options
        if options.executor is not None:
            return ExecutorProducer(recipe, options.executor)
        if options.num_workers == 0:
            return InlineProducer(recipe)
        if options.worker_type == "thread":
            return ThreadProducer(recipe, options.num_workers, options.volume_timeout)
        if options.context is None:
            raise RuntimeError("process workers need a multiprocessing context.")
        return ProcessProducer(recipe, options.num_workers, options.context, handle, options.volume_timeout)

    def iterate(self) -> Iterator[Any]:
        """Begin the next epoch; an iterator over its batches. An older iterator ends with an error."""
        runner = self.start()
        resuming, self._resuming = self._resuming, None
        if resuming is not None:
            self.epoch, self.batches = resuming.epoch, resuming.batches
        elif self.batches:
            self.epoch, self.batches = self.epoch + 1, 0
        order = self._orders.take(self.epoch, resuming.sampler_epoch if resuming else None)
        order = (resuming.order if resuming else ()) or order
        self._plan = self._make_plan(self.epoch, order)
        asked = np.bincount(
            [ticket.volume for ticket in self._plan.tickets],
            weights=[float(ticket.count) for ticket in self._plan.tickets],
            minlength=len(self.options.counts),
        )
        self._recorder.opened(self._plan.natural_draws, self._plan.num_draws, asked)
        persistent = self.options.persistent_workers or self.options.executor is not None
        replaced = dict(resuming.replaced) if resuming else None
        runner.open(self._plan, self._following if persistent else _nothing, self.batches, replaced)
        self._iterators += 1
        self._fresh = True
        return _Batches(self, self._iterators)

    def _following(self) -> EpochPlan | None:
        return self._make_plan(self.epoch + 1, self._orders.guess(self.epoch + 1))

    def _make_plan(self, epoch: int, order: tuple[int, ...]) -> EpochPlan:
        options = self.options
        warmup = None
        if epoch == 0:
            warmup = max(1, options.batch_size if options.warmup is None else options.warmup)
        return EpochPlan(
            self.seed,
            epoch,
            order,
            tuple(options.counts[list(order)].tolist()),
            queue_length=self._sizing.wished_length,
            warmup=warmup,
            shuffle=options.shuffle_patches,
            repeats=options.repeats,
            draws=self._sizing.draws,
        )

    def next_batch(self, iterator: int) -> Any:
        """A batch for the ``iterator``-th iterator.

        Raises:
            RuntimeError: for an iterator that is not the newest.
        """
        if iterator != self._iterators:
            raise RuntimeError(
                "a newer iterator of this loader has been made: its epoch has begun, and this one's has ended. One "
                "loader runs one epoch at a time; make a second loader to iterate twice at once."
            )
        if os.getpid() != self._pid:
            raise RuntimeError("this loader runs in the process that made it.")
        if self._runner is None:
            raise RuntimeError("the loader was closed during this epoch.")
        requested = self._recorder.requested(first=self._fresh)
        batch = self._runner.next(self.options.timeout)
        if batch is None:
            if not self.options.persistent_workers:
                self.stop()
            raise StopIteration
        self._fresh = False
        if batch.handover is not None:
            batch.handover()
        self.batches += 1
        self._recorder.delivered(requested, batch.volumes, batch.new)
        return batch.content

    def stop(self) -> None:
        """End workers and give the slab back; the next epoch starts them again."""
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None
        self._runner = None

    # -- memory

    def probe(self) -> SlabLayout:
        """The slab's layout; where no volume has been prepared yet, the first one is, and used later."""
        queue = self._runner.queue if self._runner else None
        if queue is not None and queue.info is not None:
            return queue.info.slab.layout
        if self._prepared is None:
            plan = self._make_plan(self.epoch, self._orders.guess(self.epoch))
            self._prepared = self._prepare_first(plan)
        layout = SlabLayout(1, array_specs(self._prepared[1].patches[0]))
        return SlabLayout(self._sizing.slots(self._sizing.queue_length(layout.patch_nbytes)), layout.keys)

    def _prepare_first(self, plan: EpochPlan) -> tuple[Ticket, PreparedVolume]:
        options = self.options
        preparer = Preparer(Recipe(options.dataset, self.seed, options.patch_transform), "inline")
        entry = next(entry for entry, ticket in enumerate(plan.tickets) if ticket.count)
        ticket, attempt = plan.tickets[entry], 0
        while True:
            try:
                return ticket, preparer(ticket)
            except Exception as error:
                other = plan.replacement(entry, attempt) if options.on_error == "replace" else None
                if other is None:
                    name = volume_name(options.dataset, ticket.volume)
                    raise Failure.of(error).exception(name, "in the calling process") from error
                ticket, attempt = other, attempt + 1

    def memory_bytes(self) -> int:
        """Bytes of the slab and of the batches in flight."""
        layout = self.probe()
        return layout.nbytes + 3 * self.options.batch_size * layout.patch_nbytes

    # -- statistics and state

    def stats(self) -> QueueStats:
        """The figures now."""
        queue = self._runner.queue if self._runner else None
        info = queue.info if queue else None
        return self._recorder.stats(
            epoch=self.epoch,
            ready=queue.ready_patches if queue else 0,
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
            after_sampling=stages_after_sampling(options.dataset) + patch_transform,
            item_transform=options.item_transform,
            patch_transform=options.patch_transform,
            suffix=file_suffix(options.dataset),
            cpus=available_cpus() / ranks_on_this_host(),
            memory=available_memory() / ranks_on_this_host() + stats.slab_bytes,
            patch_nbytes=queue.info.slab.layout.patch_nbytes if queue and queue.info else 0,
        )

    def position(self) -> Position:
        """Where the loader is."""
        if self._resuming is not None:
            return self._resuming
        over = self.batches == len(self)
        begun = self._plan is not None and self._plan.epoch == self.epoch and self.batches > 0 and not over
        return Position(
            epoch=self.epoch + over,
            batches=0 if over else self.batches,
            order=self._plan.order if begun and self._plan and not self._orders.repeatable else (),
            sampler_epoch=self._orders.sampler_epoch if begun else None,
            rank=_rank(),
            replaced=tuple(self._runner.queue.replaced.items()) if begun and self._runner else (),
            generators=self._orders.generators(before=begun),
        )

    def state_dict(self) -> dict[str, Any]:
        """The position, and what of the arguments decides the batches, as plain values."""
        length = self.stats().queue_length or self._sizing.wished_length
        return {**self.position().as_dict(), "decisive": {**self._decisive(), "queue_length": length}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the position of ``state``."""
        position, decisive = Position.from_dict(state), dict(state["decisive"])
        if position.is_of_its_rank_alone and position.rank != _rank():
            raise ValueError(
                f"the state was taken on rank {position.rank}, and holds its order of volumes; this is rank {_rank()}. "
                "Save a checkpoint on each rank, and load each rank's own."
            )
        own = self._decisive()
        if self.options.seed is None:
            own["seed"] = decisive["seed"]
        if self.options.queue_length is not None:
            own["queue_length"] = self._sizing.wished_length
        for name, value in own.items():
            if name in decisive and decisive[name] != value and (position.batches or name != "queue_length"):
                raise ValueError(
                    f"the state was taken with {name}={decisive[name]!r}, and this loader has {value!r}: its batches "
                    f"would not go on where the state's end. Make the loader with {name}={decisive[name]!r}."
                )
        self.stop()
        self.seed = decisive["seed"]
        self._orders = VolumeOrders(self.options.sampler, self.seed, len(self.options.counts))
        self._orders.restore(position.generators)
        if self.options.queue_length is None:
            self._sizing = replace(self._sizing, length=decisive["queue_length"], budget=None)
        self._plan = self._prepared = None
        self._resuming = position
        self._iterators += 1

    def _decisive(self) -> dict[str, Any]:
        options, sizing = self.options, self._sizing
        return {
            "seed": self.seed,
            "volumes": len(options.counts),
            "patches_per_epoch": sizing.patches,
            "batch_size": options.batch_size,
            "drop_last": options.drop_last,
            "repeats": options.repeats,
            "shuffle_patches": options.shuffle_patches,
            "warmup": options.warmup,
        }

    def set_epoch(self, epoch: int) -> None:
        """Name the next epoch, to the sampler too where that has a ``set_epoch``."""
        if hasattr(self.options.sampler, "set_epoch"):
            self.options.sampler.set_epoch(int(epoch))
        if self._resuming is None or self._resuming.epoch != epoch:
            self._resuming = Position(int(epoch), 0, rank=_rank(), generators=self._orders.generators())


class _Batches:
    """One epoch's batches."""

    def __init__(self, session: QueueSession, number: int) -> None:
        self._session = session
        self._number = number
        self._over = False

    def __iter__(self) -> _Batches:
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


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def _nothing() -> None:
    """No plan for a following epoch."""


def _close(runner: Runner, handle: SlabHandle, pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked child's copy: threads, workers and the slab are its parent's
    runner.close()
    handle.close()
