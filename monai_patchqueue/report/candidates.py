# SPDX-License-Identifier: Apache-2.0
"""Which settings would keep a consumer from waiting: candidates, and what the model says of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from ..queue.settings import LoaderSettings
from .model import StageTimes, capacities, covers_longest, deliverable, expected_starved, mixing

__all__ = ["WELL", "Candidate", "best", "candidates", "ends_waiting", "with_store"]

#: Stages need to be so much faster than the consumer for it not to wait: no volume takes the mean time.
SPARE = 1.2
#: A consumer that waits for a smaller share of its time is kept waiting by nobody.
WELL = 0.05
_HELPS = 1.25
# Patches of a batch may come from fewer volumes than before, down to this share.
_MIXING_KEPT = 0.8
# More workers than that for each processor only help with storage that nobody has.
_WORKERS_PER_CPU = 8
_MOST_SAMPLES = 4


@dataclass(frozen=True)
class Candidate:
    """Settings that differ from those that a loader has, with the stage times that go with them.

    Attributes:
        times: of the stages.
        settings: as changed.
        changes: arguments of the loader with their new values.
    """

    times: StageTimes
    settings: LoaderSettings
    changes: Mapping[str, Any] = field(default_factory=dict)

    def changed(self, times: StageTimes | None = None, **changes: Any) -> Candidate:
        """The candidate with further changes."""
        return Candidate(times or self.times, replace(self.settings, **changes), {**self.changes, **changes})

    @property
    def starved(self) -> float:
        """Share of the consumer's time that would go by waiting."""
        return expected_starved(self.times, self.settings)

    @property
    def patches_per_second(self) -> float:
        """What the slowest stage, the consumer's own work included, can deliver."""
        return deliverable(self.times, self.settings)


Move = Callable[[Candidate], Iterator[Candidate]]


def candidates(start: Candidate, enough: Callable[[Candidate], bool]) -> list[Candidate]:
    """The weakest changes that are enough, each kind of change alone before several together.

    Of two that use the same kinds of changes, the weaker is given; of one that holds another, the other.
    """
    found: list[tuple[set[Move], Candidate]] = []
    for size in range(1, len(_MOVES) + 1):
        for moves in combinations(_MOVES, size):
            if any(smaller <= set(moves) for smaller, _ in found):
                continue
            first = next((each for each in _made(start, moves) if enough(each)), None)
            if first is not None:
                found.append((set(moves), first))
    return [candidate for _, candidate in found]


def best(start: Candidate) -> Candidate | None:
    """What helps where nothing is enough: the first kind of change, or pair of kinds, that gives a quarter more.

    It is the weakest change of that kind that gives about as much as any of it. ``None`` if there is none.
    """
    for size in (1, 2):
        for moves in combinations(_MOVES, size):
            made = list(_made(start, moves))
            most = max((each.patches_per_second for each in made), default=0.0)
            if most >= _HELPS * start.patches_per_second:
                return next(each for each in made if each.patches_per_second >= 0.97 * most)
    return None


def ends_waiting(candidate: Candidate, uneven: bool = False) -> bool:
    """Whether all stages are faster than the consumer, with some to spare; and for slow volumes too, if ``uneven``."""
    times, settings = candidate.times, candidate.settings
    if settings.num_workers == 0:
        return False
    rates = capacities(times, settings)
    wanted = rates.pop("step")
    fast = min(rates.values()) >= SPARE * wanted and candidate.starved < WELL
    return fast and (not uneven or covers_longest(times, settings))


def with_store(start: Candidate, seconds: float) -> Candidate:
    """What would be if a volume took so many seconds less, in processor time as far as that was spent on it."""
    times = start.times
    left = max(times.volume - seconds, 0.0)
    share = left / times.volume if times.volume else 1.0
    return Candidate(replace(times, volume=left, volume_cpu=times.volume_cpu * share), start.settings)


def _made(start: Candidate, moves: Sequence[Move]) -> Iterator[Candidate]:
    if not moves:
        yield start
        return
    for candidate in moves[0](start):
        yield from _made(candidate, moves[1:])


def _keep_workers(start: Candidate) -> Iterator[Candidate]:
    if not start.settings.persistent_workers and start.settings.num_workers:
        yield start.changed(persistent_workers=True)


def _processes(start: Candidate) -> Iterator[Candidate]:
    """Workers that do not share an interpreter; of a thread's time, some was waiting for the others to let go of it."""
    settings, times = start.settings, start.times
    if settings.worker_type != "thread" or not settings.num_workers:
        return
    others = (settings.num_workers - 1) * times.volume_cpu
    alone = max(times.volume - others, times.volume_cpu)
    yield start.changed(replace(times, volume=alone), worker_type="process")


def _item_transform_in_workers(start: Candidate) -> Iterator[Candidate]:
    """Each patch is drawn once, so that it makes no difference when it is transformed."""
    settings, times = start.settings, start.times
    if settings.item_transform is None or settings.patch_transform is not None or settings.repeats > 1:
        return
    if not times.item_transform:
        return
    computing = min(times.consumer_cpu / (times.assembly + times.step), 1.0)
    each = times.item_transform / settings.batch_size
    moved = replace(
        times,
        assembly=times.assembly - times.item_transform,
        item_transform=0.0,
        consumer_cpu=times.consumer_cpu - computing * times.item_transform,
        patch=times.patch + each,
        patch_cpu=times.patch_cpu + computing * each,
    )
    yield start.changed(moved, patch_transform=settings.item_transform, item_transform=None)


def _more_samples(start: Candidate) -> Iterator[Candidate]:
    """More patches of each volume, from a queue that holds as many volumes as before, if memory allows."""
    settings = start.settings
    if settings.fixed_samples or settings.samples_per_volume != int(settings.samples_per_volume):
        return
    for times in range(2, _MOST_SAMPLES + 1):
        samples = times * int(settings.samples_per_volume)
        for length in (times * settings.queue_length, settings.queue_length):
            more = start.changed(samples_per_volume=samples, queue_length=length)
            fits = more.settings.slab_bytes() <= settings.memory
            if fits and mixing(more.settings) >= _MIXING_KEPT * mixing(settings):
                yield more
                break


def _more_workers(start: Candidate) -> Iterator[Candidate]:
    settings = start.settings
    for workers in range(settings.num_workers + 1, min(settings.volumes, int(_WORKERS_PER_CPU * settings.cpus)) + 1):
        more = start.changed(num_workers=workers)
        if more.settings.slab_bytes() > settings.memory:
            return
        yield more


_MOVES: tuple[Move, ...] = (_keep_workers, _processes, _item_transform_in_workers, _more_workers, _more_samples)
