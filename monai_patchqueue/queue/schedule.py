# SPDX-License-Identifier: Apache-2.0
"""The schedule: which volume is prepared next and which patch is drawn next.

Everything here is a pure function of (seed, epoch, order, counts): no I/O, no clock, no threads. So an epoch can be
simulated without loading anything, which is what resuming, lengths and tests do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from typing_extensions import Self

__all__ = ["Draw", "Drawing", "Draws", "EpochPlan", "Plan", "Ticket", "seed_sequence"]

# The first element of each spawn key: what the randomness is for.
ORDER, PREPARE, DRAW, ITEM, BATCH, REPLACE = range(6)

# In the first epoch the window grows by one patch every so many draws: batches come early, and mixing hardly suffers.
_GROWTH = 8
# Uniform numbers are made in blocks, for speed; their values don't depend on the block's size.
_BLOCK = 1024


def seed_sequence(seed: int, *key: int) -> np.random.SeedSequence:
    """The independent random stream that belongs to ``key`` under ``seed``.

    Example:
        >>> a, b = seed_sequence(0, PREPARE, 3, 1, 0), seed_sequence(0, PREPARE, 3, 1, 1)
        >>> bool((a.generate_state(2) == b.generate_state(2)).any())
        False
    """
    return np.random.SeedSequence(seed, spawn_key=key)


@dataclass(frozen=True)
class Ticket:
    """An order to prepare one volume: its ``occurrence``-th appearance in ``epoch``, giving ``count`` patches."""

    epoch: int
    volume: int
    occurrence: int
    count: int


class Draw(NamedTuple):
    """One draw from the window: patch ``patch`` of the epoch's ``entry``-th volume, for the ``repeat``-th time.

    ``last`` says that the patch leaves the queue with this draw. In a random queue, which may have forgotten how often
    an item was drawn before, ``repeat`` is the batch's number; it tells besides whether this draw is the ``first``, the
    item's number, its importance weight, and its age in batches.
    """

    entry: int
    patch: int
    repeat: int
    last: bool
    first: bool
    item: int = 0
    weight: float = 1.0
    age: int = 0


class Drawing(Iterator[Draw], ABC):
    """The draws of a plan, in order."""

    def __iter__(self) -> Self:
        return self

    @property
    def ready(self) -> bool:
        """Whether it is decided what is drawn next."""
        return True

    def landed(self, entry: int) -> list[tuple[int, int]]:
        """An entry's patches are there. Gives the patches, as (entry, patch), that leave to make room for them."""
        return []

    def leaving(self) -> list[tuple[int, int]]:
        """The patches, as (entry, patch), that leave after the batch just drawn, drawn or not."""
        return []

    @abstractmethod
    def remaining(self) -> Callable[[int], set[int]]:
        """A function from an entry to those of its patches that, as of now, may still be drawn."""

    @property
    def first_entry(self) -> int:
        """An entry before which nothing is needed any more."""
        return 0


class Plan(ABC):
    """Which volumes are prepared, in which order, and what is drawn of them."""

    epoch: int

    @abstractmethod
    def ticket(self, entry: int) -> Ticket | None:
        """The ``entry``-th volume to prepare; ``None`` after the last."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return False

    def __iter__(self) -> Iterator[Ticket]:
        entry = 0
        while (ticket := self.ticket(entry)) is not None:
            yield ticket
            entry += 1

    @abstractmethod
    def replacement(self, entry: int, attempt: int) -> Ticket | None:
        """What is prepared in place of an entry's volume after it has failed, and ``attempt`` replacements too."""

    @abstractmethod
    def with_length(self, queue_length: int) -> Self:
        """The same plan for a queue of another length."""

    @abstractmethod
    def drawing(self, batches: int, batch_size: int) -> Drawing:
        """The draws that follow after so many batches."""


@dataclass(frozen=True)
class EpochPlan(Plan):
    """All that decides an epoch.

    Args:
        seed: the run's seed.
        epoch: number of the epoch.
        order: volumes in the order in which they are prepared; a volume may occur several times.
        counts: patches of each entry of ``order``.
        queue_length: size of the window in patches.
        warmup: size of the window at the epoch's first draw; it grows by one patch every 8 draws up to
            ``queue_length``. ``None``: full from the start, as later epochs are, whose volumes are prepared
            while the epoch before drains.
        shuffle: draw uniformly from the window; otherwise in order.
        repeats: how often each patch is drawn.
        draws: draws in the epoch, where that is not what the order gives: a longer epoch loses its last draws, a
            shorter one goes through its order again (with new occurrences, so with new patches).

    Example:
        >>> plan = EpochPlan(seed=0, epoch=0, order=(5, 2, 5), counts=(2, 1, 2), queue_length=3)
        >>> plan.tickets[2]
        Ticket(epoch=0, volume=5, occurrence=1, count=2)
        >>> sorted((draw.entry, draw.patch) for draw in Draws(plan))
        [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    """

    seed: int
    epoch: int
    order: tuple[int, ...]
    counts: tuple[int, ...]
    queue_length: int
    warmup: int | None = None
    shuffle: bool = True
    repeats: int = 1
    draws: int | None = None

    @cached_property
    def natural_draws(self) -> int:
        """Draws that the order gives by itself."""
        return sum(self.counts) * self.repeats

    @cached_property
    def num_draws(self) -> int:
        """Draws in the epoch."""
        if self.draws is None or not self.natural_draws:
            return self.natural_draws
        return self.draws

    @cached_property
    def tickets(self) -> tuple[Ticket, ...]:
        """The volumes to prepare, in stream order."""
        seen: Counter[int] = Counter()
        tickets = []
        laps = -(-self.num_draws // self.natural_draws) if self.natural_draws else 1
        missing = -(-self.num_draws // self.repeats)
        for lap in range(laps):
            for volume, count in zip(self.order, self.counts, strict=True):
                if lap and missing <= 0:
                    break
                tickets.append(Ticket(self.epoch, volume, seen[volume], count))
                seen[volume] += 1
                missing -= count
        return tuple(tickets)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Number of patches before each entry, and after the last."""
        return tuple(accumulate((ticket.count for ticket in self.tickets), initial=0))

    def ticket(self, entry: int) -> Ticket | None:
        return self.tickets[entry] if entry < len(self.tickets) else None

    @property
    def empty(self) -> bool:
        return not self.num_draws

    def with_length(self, queue_length: int) -> EpochPlan:
        return replace(self, queue_length=queue_length)

    def drawing(self, batches: int, batch_size: int) -> Draws:
        return Draws(self).advance(min(batches * batch_size, self.num_draws))

    def replacement(self, entry: int, attempt: int) -> Ticket | None:
        """What is prepared in place of an entry's volume after it has failed, and ``attempt`` replacements too.

        One of the epoch's other volumes, chosen by the seed; each is tried once. ``None`` when all have failed. Its
        occurrence is one that the epoch does not have otherwise, so its patches are new ones.
        """
        failed = self.tickets[entry]
        counts = {ticket.volume: ticket.count for ticket in self.tickets if ticket.count}
        others = sorted(counts.keys() - {failed.volume})
        if attempt >= len(others):
            return None
        sequence = seed_sequence(self.seed, REPLACE, self.epoch, failed.volume, failed.occurrence)
        volume = others[int(np.random.Generator(np.random.Philox(sequence)).permutation(len(others))[attempt])]
        return Ticket(self.epoch, volume, len(self.tickets) + entry, counts[volume])

    def window_size(self, drawn: int) -> int:
        """Size of the window after ``drawn`` draws; it depends on nothing else."""
        if self.warmup is None:
            return self.queue_length
        return min(self.queue_length, self.warmup + drawn // _GROWTH)


@dataclass
class Draws(Drawing):
    """The draws of an epoch, in order: a shuffle buffer over the stream of patches.

    Each draw is uniform over the window; the patch leaves it after ``plan.repeats`` draws, and the next patch of the
    stream enters. At the end of the stream the window drains. Without shuffling, patches are drawn as they come.
    """

    plan: EpochPlan
    drawn: int = 0
    _window: list[int] = field(default_factory=list)
    _uses: dict[int, int] = field(default_factory=dict)
    _entered: int = 0

    def __post_init__(self) -> None:
        self._rng = np.random.Generator(np.random.Philox(seed_sequence(self.plan.seed, DRAW, self.plan.epoch)))
        self._uniform: list[float] = []

    def __next__(self) -> Draw:
        plan = self.plan
        if self.drawn >= plan.num_draws:
            raise StopIteration
        if plan.shuffle:
            room = plan.window_size(self.drawn) - len(self._window)
            if room > 0:
                entering = min(room, plan.starts[-1] - self._entered)
                self._window.extend(range(self._entered, self._entered + entering))
                self._entered += entering
            place = int(self._next_uniform() * len(self._window))
            patch = self._window[place]
            repeat = self._uses.pop(patch, 0)
            last = repeat + 1 == plan.repeats
            if last:
                self._window[place] = self._window[-1]
                self._window.pop()
            else:
                self._uses[patch] = repeat + 1
        else:
            patch, repeat = divmod(self.drawn, plan.repeats)
            last = repeat + 1 == plan.repeats
            self._entered = patch + last
        self.drawn += 1
        entry = bisect_right(plan.starts, patch) - 1
        return Draw(entry, patch - plan.starts[entry], repeat, last, first=not repeat)

    def advance(self, draws: int) -> Draws:
        """Skip ``draws`` draws, as resuming in mid-epoch does."""
        for _ in range(draws):
            next(self)
        return self

    def remaining(self) -> Callable[[int], set[int]]:
        left: dict[int, set[int]] = {}
        if self.drawn < self.plan.num_draws:
            for patch in (*self._window, *range(self._entered, self.plan.starts[-1])):
                entry = bisect_right(self.plan.starts, patch) - 1
                left.setdefault(entry, set()).add(patch - self.plan.starts[entry])
        return lambda entry: left.get(entry, set())

    def _next_uniform(self) -> float:
        if not self._uniform:
            self._uniform = self._rng.random(_BLOCK)[::-1].tolist()
        return self._uniform.pop()
