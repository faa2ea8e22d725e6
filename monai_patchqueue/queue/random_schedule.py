# SPDX-License-Identifier: Apache-2.0
"""The schedule of a random queue: items stay and are drawn many times, until newer ones take their place.

As pure as an epoch's schedule, but for ``always``, where what is there depends on how fast the workers are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from .laps import Laps
from .schedule import DRAW, Draw, Drawing, Plan, Ticket, seed_sequence

__all__ = ["RandomDraws", "RandomPlan", "Residents", "ReusePolicy"]

Array = np.ndarray[Any, np.dtype[Any]]

# A logarithm of probability below that of any priority.
_NEVER = -1e9


@dataclass(frozen=True)
class ReusePolicy:
    """How often items are drawn.

    Args:
        batch_size: items in a batch.
        always: items enter as fast as workers prepare them, and the schedule follows; otherwise it leads.
        samples_per_insert: draws for each item that enters, as in Reverb's rate limiter. With ``always``, a limit:
            a batch waits while draws + batch_size > samples_per_insert × (items that have entered).
        min_size_to_sample: a batch waits until there are so many items.
        max_times_sampled: an item leaves after so many draws; ``None``: only to make room.
        priority_exponent: draw item i with a probability in proportion to priority_i ** priority_exponent; ``None``:
            all with the same.
        importance_exponent: a drawn item's weight is (least probability / its own) ** importance_exponent.
    """

    batch_size: int
    always: bool
    samples_per_insert: float | None
    min_size_to_sample: int
    max_times_sampled: int | None = None
    priority_exponent: float | None = None
    importance_exponent: float = 0.0

    @property
    def on_demand(self) -> bool:
        """Whether a batch is drawn only when it is asked for: by the priorities, and with the state, of that moment."""
        return self.priority_exponent is not None or self.max_times_sampled is not None

    def entered(self, fill: int, batches: int) -> int:
        """Items that have entered after so many batches, at least, with ``fill`` at the start."""
        rate = self.samples_per_insert or self.batch_size
        return fill + int(batches * self.batch_size / rate)


@dataclass(frozen=True)
class Residents:
    """Which items are in the queue after so many batches.

    Args:
        batches: batches drawn.
        fill: items that were there at the first batch.
        entered: items that have entered.
        oldest: number of the oldest item that is still there.
        times: how often each item from ``oldest`` to ``entered`` was drawn, -1 if it has left; empty where all are
            there, and it does not matter.
        priorities: of the same items; empty where all count the same.
        highest: the highest priority so far.
    """

    batches: int
    fill: int
    entered: int
    oldest: int
    times: tuple[int, ...] = ()
    priorities: tuple[float, ...] = ()
    highest: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, which ``torch.load(weights_only=True)`` takes."""
        return {**asdict(self), "times": list(self.times), "priorities": list(self.priorities)}

    @staticmethod
    def from_dict(state: Mapping[str, Any]) -> Residents:
        """What :meth:`as_dict` gave."""
        return Residents(**{**state, "times": tuple(state["times"]), "priorities": tuple(state["priorities"])})


@dataclass(frozen=True)
class RandomPlan(Plan):
    """All that decides a random queue.

    Args:
        seed: the run's seed.
        laps: the stream of volumes.
        queue_length: the most items that are there at a time.
        policy: how often items are drawn.
        start: where an earlier run stopped.
        epoch: always 0: a random queue has one stream without end.

    Example:
        >>> policy = ReusePolicy(batch_size=2, always=False, samples_per_insert=None, min_size_to_sample=2)
        >>> draws = RandomPlan(0, Laps(0, (1, 1, 1, 1, 1)), 3, policy).drawing(0, 2)
        >>> draws.begin(3)
        >>> sorted(next(draws).item for _ in range(2)), draws.leaving()  # two of items 0 to 2; the oldest one leaves
        ([0, 2], [(0, 0)])
    """

    seed: int
    laps: Laps = field(compare=False)
    queue_length: int
    policy: ReusePolicy
    start: Residents | None = None
    epoch: int = 0

    def ticket(self, entry: int) -> Ticket | None:
        return self.laps.ticket(entry)

    def replacement(self, entry: int, attempt: int) -> Ticket | None:
        return self.laps.replacement(entry, attempt)

    def with_length(self, queue_length: int) -> RandomPlan:
        return replace(self, queue_length=queue_length)

    def drawing(self, batches: int, batch_size: int) -> RandomDraws:
        return RandomDraws(self)


@dataclass(slots=True)
class _Item:
    since: int  # batches drawn when it entered
    times: int = 0
    priority: float = 1.0


class RandomDraws(Drawing):
    """The draws of a random queue: batch after batch, without replacement in a batch.

    With ``always``, items enter when they have landed; otherwise in the order of the stream, one for each
    ``samples_per_insert`` draws, and a batch waits for those of its items that have not landed yet. The oldest leave
    when there are more than ``queue_length``.
    """

    def __init__(self, plan: RandomPlan) -> None:
        self.plan = plan
        self.batches = 0
        self.fill: int | None = None
        self.available = 0
        self._laps = plan.laps
        self._items: dict[int, _Item] = {}  # the oldest first
        self._entered = 0
        self._landed: set[int] = set()
        self._first_missing = 0  # the first item that has not landed
        self._arrived: set[int] = set()  # entries from this one on:
        self._on_the_way = 0
        self._highest = 1.0
        self._batch: list[Draw] = []
        self._leaving: list[int] = []
        self._allowed = 0
        self._updates: deque[tuple[list[int], list[float]]] = deque()
        if plan.start is not None:
            self._resume(plan.start)

    # -- from outside

    def begin(self, fill: int) -> None:
        """Let draws begin, from the first ``fill`` items."""
        if self.fill is not None:
            return
        if not self.plan.policy.always:
            self._enter(self._entered + fill)
        self.fill = fill

    def allow(self, batches: int) -> None:
        """Let so many batches be drawn, where they are drawn on demand."""
        self._allowed = batches

    def update_priorities(self, items: Iterable[int], values: Iterable[float]) -> None:
        """Set priorities for the next batch; items that have left are passed over."""
        self._updates.append((list(items), list(values)))

    def residents(self, batches: int) -> Residents:
        """The items after so many batches: the last one drawn, or the one before."""
        policy, fill = self.plan.policy, self.fill or 0
        if policy.always:
            entered = max((*self._items, self._entered - 1)) + 1
            return Residents(batches, 0, entered, entered)
        if not policy.on_demand:
            entered = policy.entered(fill, batches)
            oldest = max(entered - self.plan.queue_length, 0)
            return Residents(batches, fill, entered, oldest)
        self._take_updates()
        oldest = min(self._items, default=self._entered)
        numbers = range(oldest, self._entered)
        return Residents(
            batches,
            fill,
            self._entered,
            oldest,
            tuple(self._items[n].times if n in self._items else -1 for n in numbers),
            tuple(self._items[n].priority if n in self._items else 0.0 for n in numbers),
            self._highest,
        )

    # -- for the queue

    @property
    def ready(self) -> bool:
        policy = self.plan.policy
        if self.fill is None or (policy.on_demand and self.batches >= self._allowed):
            return False
        if len(self._items) < max(policy.batch_size, policy.min_size_to_sample):
            return False
        if not policy.always or policy.samples_per_insert is None:
            return True
        return (self.batches + 1) * policy.batch_size <= policy.samples_per_insert * self._entered

    def landed(self, entry: int) -> list[tuple[int, int]]:
        self._arrived.add(entry)
        items = [item for item in self._laps.items_of(entry) if self._is_needed(item)]
        if not self.plan.policy.always:
            self._landed.update(items)
            self._count_available()
            return []
        for item in items:
            self._items[item] = _Item(self.batches, priority=self._highest)
        self._entered += len(items)
        gone = self._evict()
        self.available = len(self._items)
        return [self._laps.place_of(item) for item in gone]

    def leaving(self) -> list[tuple[int, int]]:
        return [self._laps.place_of(item) for item in self._leaving]

    def remaining(self) -> Callable[[int], set[int]]:
        present, entered, laps = set(self._items), self._entered, self._laps

        def left(entry: int) -> set[int]:
            items = laps.items_of(entry)
            return {item - items.start for item in items if item in present or item >= entered}

        return left

    @property
    def first_entry(self) -> int:
        return self._laps.place_of(min(self._items, default=self._entered))[0]

    def __next__(self) -> Draw:
        if not self._batch:
            self._draw()
        return self._batch.pop()

    # -- inside

    def _draw(self) -> None:
        policy = self.plan.policy
        self._take_updates()
        numbers = list(self._items)
        rng = np.random.Generator(np.random.Philox(seed_sequence(self.plan.seed, DRAW, 0, self.batches)))
        if policy.priority_exponent is None:
            chosen = rng.choice(len(numbers), policy.batch_size, replace=False)
            weights = np.ones(len(chosen))
        else:
            priorities = np.array([item.priority for item in self._items.values()])
            chosen, weights = _by_priority(rng, priorities, policy)
        leaving = []
        for place, weight in zip(chosen.tolist(), weights.tolist(), strict=True):
            number = numbers[place]
            item = self._items[number]
            entry, patch = self._laps.place_of(number)
            age = self.batches - item.since
            self._batch.append(Draw(entry, patch, self.batches, False, not item.times, number, weight, age))
            item.times += 1
            if item.times == policy.max_times_sampled:
                leaving.append(number)
        self._batch.reverse()  # they are taken from its end
        for number in leaving:
            del self._items[number]
        self.batches += 1
        if not policy.always:
            self._enter(max(policy.entered(self.fill or 0, self.batches), self._entered))
            leaving += self._evict()
            short = policy.min_size_to_sample - len(self._items)
            if short > 0:
                self._enter(self._entered + short)
        self._leaving = leaving
        self._landed.difference_update(leaving)
        self._count_available()
        self._forget()

    def _forget(self) -> None:
        """Laps are needed as long as a volume of theirs is there, or still on its way."""
        while self._on_the_way in self._arrived:
            self._arrived.discard(self._on_the_way)
            self._on_the_way += 1
        oldest = min(self._items, default=self._entered) - self.plan.queue_length
        self._laps.forget(min(oldest, self._laps.items_of(self._on_the_way).start))

    def _enter(self, stop: int) -> None:
        for number in range(self._entered, stop):
            self._items[number] = _Item(self.batches, priority=self._highest)
        self._entered = stop

    def _evict(self) -> list[int]:
        excess = len(self._items) - self.plan.queue_length
        gone = [number for number, _ in zip(self._items, range(excess), strict=False)]
        for number in gone:
            del self._items[number]
        return gone

    def _count_available(self) -> None:
        if self.plan.policy.always:
            self.available = len(self._items)
        elif self.fill is None:
            while self._first_missing in self._landed:
                self._first_missing += 1
            self.available = min(self._first_missing, self.plan.queue_length)
        else:
            self.available = len(self._landed & self._items.keys())

    def _is_needed(self, number: int) -> bool:
        return number in self._items or number >= self._entered or self.plan.policy.always

    def _take_updates(self) -> None:
        while self._updates:
            for number, value in zip(*self._updates.popleft(), strict=True):
                self._highest = max(self._highest, value)
                if number in self._items:
                    self._items[number].priority = value

    def _resume(self, start: Residents) -> None:
        self.batches, self._entered, self._highest = start.batches, start.entered, start.highest
        self._laps.forget(start.oldest)
        self._on_the_way = self._laps.place_of(start.oldest)[0]
        if self.plan.policy.always:
            return
        self.fill = start.fill
        for place, number in enumerate(range(start.oldest, start.entered)):
            times = start.times[place] if start.times else 0
            if times >= 0:
                priority = start.priorities[place] if start.priorities else 1.0
                self._items[number] = _Item(start.batches, times, priority)


def _by_priority(rng: np.random.Generator, priorities: Array, policy: ReusePolicy) -> tuple[Array, Array]:
    """Places drawn one after the other without replacement, and their importance weights.

    The largest of log p + Gumbel noise is distributed as one draw with probabilities p, the next as the draw after it
    (Efraimidis & Spirakis 2006; Kool et al. 2019). Weights are those of prioritized experience replay (Schaul et al.
    2016), of the first draw's probabilities. What has no probability is drawn when nothing else is left.
    """
    shares = priorities ** (policy.priority_exponent or 0.0)
    noise = rng.gumbel(size=len(shares))
    with np.errstate(divide="ignore"):
        scores = np.where(shares > 0, np.log(shares), _NEVER) + noise
    chosen = np.argsort(-scores, kind="stable")[: policy.batch_size]
    least = shares[shares > 0].min(initial=np.inf)
    drawn = np.maximum(shares[chosen], least)
    weights = (least / drawn) ** policy.importance_exponent if np.isfinite(least) else np.ones(len(chosen))
    return chosen, weights
