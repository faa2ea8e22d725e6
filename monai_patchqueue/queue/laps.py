# SPDX-License-Identifier: Apache-2.0
"""A stream of volumes without end: one pass through the data after the other, each in a random order of its own."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .schedule import ORDER, EpochPlan, Ticket, seed_sequence

__all__ = ["Laps"]


class _Lap(NamedTuple):
    plan: EpochPlan
    first_entry: int
    first_item: int

    @property
    def stop_entry(self) -> int:
        return self.first_entry + len(self.plan.order)

    @property
    def stop_item(self) -> int:
        return self.first_item + sum(self.plan.counts)


class Laps:
    """The stream's entries (volumes) and items (their patches), numbered from 0.

    Each lap has every volume once, in random order, but that none comes again within ``apart`` volumes: otherwise a
    queue would have some of them twice, and others not at all, whenever a lap ends. Each rank of a distributed run has
    every ``replicas``-th volume of a lap's order.

    Args:
        seed: the run's seed.
        counts: patches that each volume gives; those that give none are left out.
        rank: of this process.
        replicas: processes.
        apart: volumes from one appearance of a volume to the next, at least, if there are so many.

    Example:
        >>> laps = Laps(0, (2, 1))
        >>> [laps.ticket(entry).volume for entry in range(4)], laps.items_of(2), laps.place_of(3)
        ([1, 0, 0, 1], range(3, 5), (2, 0))
    """

    def __init__(self, seed: int, counts: Sequence[int], rank: int = 0, replicas: int = 1, apart: int = 1) -> None:
        self._seed = seed
        self._counts = tuple(counts)
        self._volumes = np.flatnonzero(np.asarray(counts)).tolist()
        self._last_order = self._volumes  # of all ranks
        self._apart = 1
        if len(self._volumes) < replicas:
            raise ValueError(
                f"{len(self._volumes)} items for {replicas} ranks: each rank needs one of its own. Use fewer ranks or "
                "more data."
            )
        self._rank = rank
        self._replicas = replicas
        self._laps = deque([self._lap(0, 0, 0)])
        self._apart = min(apart, len(self._volumes))

    def ticket(self, entry: int) -> Ticket:
        """The order to prepare an entry's volume."""
        lap = self._of_entry(entry)
        return lap.plan.tickets[entry - lap.first_entry]

    def replacement(self, entry: int, attempt: int) -> Ticket | None:
        """What is prepared in place of an entry's volume after it has failed."""
        lap = self._of_entry(entry)
        return lap.plan.replacement(entry - lap.first_entry, attempt)

    def items_of(self, entry: int) -> range:
        """The items that an entry gives."""
        lap = self._of_entry(entry)
        start, stop = lap.plan.starts[entry - lap.first_entry :][:2]
        return range(lap.first_item + start, lap.first_item + stop)

    def place_of(self, item: int) -> tuple[int, int]:
        """An item's entry, and which of its patches it is."""
        lap = self._of_item(item)
        local = item - lap.first_item
        entry = bisect_right(lap.plan.starts, local) - 1
        return lap.first_entry + entry, local - lap.plan.starts[entry]

    def forget(self, item: int) -> None:
        """What lies before an item's lap will not be asked for again."""
        while self._laps[0].stop_item <= item:
            if len(self._laps) == 1:
                self._append()
            self._laps.popleft()

    def _of_entry(self, entry: int) -> _Lap:
        while self._laps[-1].stop_entry <= entry:
            self._append()
        return next(lap for lap in self._laps if entry < lap.stop_entry)

    def _of_item(self, item: int) -> _Lap:
        while self._laps[-1].stop_item <= item:
            self._append()
        return next(lap for lap in self._laps if item < lap.stop_item)

    def _append(self) -> None:
        last = self._laps[-1]
        self._laps.append(self._lap(last.plan.epoch + 1, last.stop_entry, last.stop_item))

    def _lap(self, number: int, first_entry: int, first_item: int) -> _Lap:
        self._last_order = self._reordered(self._last_order, number)
        order = tuple(self._last_order[self._rank :: self._replicas])
        plan = EpochPlan(self._seed, number, order, tuple(self._counts[v] for v in order), queue_length=1)
        return _Lap(plan, first_entry, first_item)

    def _reordered(self, last: list[int], number: int) -> list[int]:
        """A random order after the last one: each time, one of those that have been away for long enough."""
        rng = np.random.Generator(np.random.Philox(seed_sequence(self._seed, ORDER, number)))
        away = len(last) - self._apart
        pool, order = last[:away], []
        for place, uniform in enumerate(rng.random(len(last)).tolist()):
            if away + place < len(last):
                pool.append(last[away + place])
            chosen = int(uniform * len(pool))
            pool[chosen], pool[-1] = pool[-1], pool[chosen]
            order.append(pool.pop())
        return order
