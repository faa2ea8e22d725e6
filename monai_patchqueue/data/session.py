# SPDX-License-Identifier: Apache-2.0
"""What stands behind a loader: from its arguments to a running queue, epoch after epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..queue.orders import VolumeOrders
from ..queue.ranks import ranks
from ..queue.schedule import EpochPlan
from .options import QueueOptions
from .position import Position
from .running import BatchIterator, RunningQueue
from .sizing import Sizing

__all__ = ["QueueSession"]


class QueueSession(RunningQueue):
    """Runs a queue for a loader or a dataset, epoch after epoch."""

    def __init__(self, options: QueueOptions) -> None:
        super().__init__(options, Sizing.of(options))
        self._orders = VolumeOrders(options.sampler, self.seed, len(options.counts))
        self._plan: EpochPlan | None = None
        self._resuming: Position | None = None  # where the next iterator begins, if not at the next epoch

    def anew(self) -> QueueSession:
        return QueueSession(self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        return QueueSession, (self.options,)

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

    def iterate(self) -> Iterator[Any]:
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
        return BatchIterator(self, self._iterators)

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

    def _plan_ahead(self) -> EpochPlan:
        return self._make_plan(self.epoch, self._orders.guess(self.epoch))

    def next_batch(self, iterator: int) -> Any:
        runner = self._runner_for(iterator)
        requested = self._recorder.requested(first=self._fresh)
        batch = runner.next(self.options.timeout)
        if batch is None:
            if not self.options.persistent_workers:
                self.stop()
            raise StopIteration
        return self._hand_out(batch, requested)

    # -- state

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
            rank=ranks()[0],
            replaced=tuple(self._runner.queue.replaced.items()) if begun and self._runner else (),
            generators=self._orders.generators(before=begun),
        )

    def state_dict(self) -> dict[str, Any]:
        length = self.stats().queue_length or self._sizing.wished_length
        return {**self.position().as_dict(), "decisive": {**self._decisive(), "queue_length": length}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        position, decisive = Position.from_dict(state), dict(state["decisive"])
        if position.is_of_its_rank_alone and position.rank != ranks()[0]:
            raise ValueError(
                f"the state was taken on rank {position.rank}, and holds its order of volumes; this is rank "
                f"{ranks()[0]}. Save a checkpoint on each rank, and load each rank's own."
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
        # Where the sampler has epochs too, it hears of it.
        if hasattr(self.options.sampler, "set_epoch"):
            self.options.sampler.set_epoch(int(epoch))
        if self._resuming is None or self._resuming.epoch != epoch:
            self._resuming = Position(int(epoch), 0, rank=ranks()[0], generators=self._orders.generators())


def _nothing() -> None:
    """No plan for a following epoch."""
