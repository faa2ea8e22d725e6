# SPDX-License-Identifier: Apache-2.0
"""Statistics of several queues as one: of runs one after the other, or of ranks side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .stats import ByVolume, QueueStats

__all__ = ["Continued", "as_plain", "combined", "from_plain"]

_COUNTED = ("batches", "patches", "volumes", "failures", "lost_draws", "extra_draws")
# Means, by what they are means over.
_MEANS = {
    "batches": (
        "volumes_per_batch",
        "wait_seconds",
        "assemble_seconds",
        "item_transform_seconds",
        "batch_transform_seconds",
        "step_seconds",
        "consumer_cpu_seconds",
        "epoch_wait_seconds",
    ),
    "volumes": ("load_seconds", "sample_seconds", "write_seconds", "cpu_seconds"),
    "patches": ("age",),
    "seconds": ("starved", "worker_busy", "assembly_busy"),
}
_LARGEST = ("max_wait_seconds", "first_wait_seconds", "max_volume_seconds")
_WEIGHTS = {figure: weight for weight, figures in _MEANS.items() for figure in figures}
_BY_VOLUME = ("volume_counts", "volume_expected", "failure_counts")
# What adds up, with what means are to be multiplied by; of ``reuse``, the patches that were drawn for the first time.
_SUMS: tuple[tuple[str, str | None], ...] = (
    *((name, None) for name in (*_COUNTED, "seconds", "reuse")),
    *_WEIGHTS.items(),
)


def combined(parts: Sequence[QueueStats], without: Iterable[QueueStats] = (), ranks: bool = False) -> QueueStats:
    """The figures of several queues as if they were one.

    Counts add up; means, shares and rates are weighted by what they are means of. What has no sum or mean, as ``fill``
    or ``bottleneck``, is the last part's.

    Args:
        parts: the figures of one run after the other, or of all ranks.
        without: figures that some of the parts include and that are not to count.
        ranks: the parts' queues run at the same time, so that their rates, workers and memory add up too; ``fill`` is
            their mean, and ``bottleneck`` that of the rank that waits most.

    Example:
        >>> day, night = QueueStats(batches=3, wait_seconds=0.2), QueueStats(batches=1, wait_seconds=1.0)
        >>> round(combined([day, night]).wait_seconds, 3)
        0.4
    """
    total = _Total.of([*((part, 1) for part in parts), *((part, -1) for part in without)])
    stats = total.stats(parts[-1], {name: max(getattr(p, name) for p in parts) for name in _LARGEST})
    if not ranks:
        return stats
    values: dict[str, Any] = _rates(stats.patches, stats.volumes, stats.seconds / len(parts))
    values |= {name: sum(getattr(p, name) for p in parts) for name in ("queue_length", "num_workers", "slab_bytes")}
    values |= {name: sum(getattr(p, name) for p in parts) / len(parts) for name in ("fill", "last_wait_seconds")}
    values |= {"epoch": max(p.epoch for p in parts), "bottleneck": max(parts, key=lambda p: p.starved).bottleneck}
    return replace(stats, **values)


class Continued:
    """Adds the figures of runs before, out of a checkpoint, to a loader's; cheap enough for each step.

    Args:
        before: those of runs before.
        already: the loader's at that time, which they include.

    Example:
        >>> Continued(QueueStats(batches=3))(QueueStats(batches=1)).batches
        4
    """

    def __init__(self, before: QueueStats | None = None, already: QueueStats | None = None) -> None:
        self._before = before
        if before is not None:
            self._total = _Total.of([(before, 1), (already or QueueStats(), -1)])

    def __call__(self, now: QueueStats) -> QueueStats:
        """All figures, with the loader's of ``now``."""
        before = self._before
        if before is None or not before.batches:
            return now
        largest = {name: max(getattr(before, name), getattr(now, name)) for name in _LARGEST}
        return (self._total + _Total.of([(now, 1)])).stats(now, largest)


@dataclass(frozen=True)
class _Total:
    """What of statistics adds up: counts, and means times what they are means over."""

    sums: Sequence[float]
    transforms: Mapping[str, float]
    by_volume: Sequence[ByVolume]

    @classmethod
    def of(cls, signed: Sequence[tuple[QueueStats, int]]) -> _Total:
        """The sum of statistics, each with the sign 1 or -1."""
        sums = [0.0] * len(_SUMS)
        transforms: defaultdict[str, float] = defaultdict(float)
        for stats, sign in signed:
            figures = vars(stats)
            new = stats.patches / stats.reuse if stats.reuse else 0.0
            for place, (name, weight) in enumerate(_SUMS):
                value = new if name == "reuse" else figures[name]
                sums[place] += sign * (value * figures[weight] if weight else value)
            for name, mean in stats.transform_seconds.items():
                transforms[name] += sign * mean * stats.volumes
        by_volume = [_by_volume([(getattr(stats, name), sign) for stats, sign in signed]) for name in _BY_VOLUME]
        return cls(sums, transforms, by_volume)

    def __add__(self, other: _Total) -> _Total:
        transforms = {
            name: self.transforms.get(name, 0.0) + other.transforms.get(name, 0.0)
            for name in {**self.transforms, **other.transforms}
        }
        by_volume = [_by_volume([(a, 1), (b, 1)]) for a, b in zip(self.by_volume, other.by_volume, strict=True)]
        return _Total([a + b for a, b in zip(self.sums, other.sums, strict=True)], transforms, by_volume)

    def stats(self, last: QueueStats, largest: dict[str, float]) -> QueueStats:
        """The statistics that have these sums; whatever has no sum is the last one's, or the largest."""
        sums = {name: max(value, 0.0) for (name, _), value in zip(_SUMS, self.sums, strict=True)}
        values: dict[str, Any] = {name: int(sums[name]) for name in _COUNTED}
        for name, weight in _WEIGHTS.items():
            values[name] = sums[name] / sums[weight] if sums[weight] else 0.0
        by_volume: dict[str, Any] = dict(zip(_BY_VOLUME, self.by_volume, strict=True))
        counts = by_volume["volume_counts"].array
        seen = counts[counts > 0]
        values |= largest | by_volume | _rates(values["patches"], values["volumes"], sums["seconds"])
        values |= {
            "transform_seconds": {name: total / (values["volumes"] or 1) for name, total in self.transforms.items()},
            "reuse": sums["patches"] / sums["reuse"] if sums["reuse"] else 0.0,
            "volumes_seen": len(seen),
            "volume_patches_min": int(seen.min()) if len(seen) else 0,
            "volume_patches_max": int(seen.max()) if len(seen) else 0,
        }
        return QueueStats(**(vars(last) | values))


def _rates(patches: int, volumes: int, seconds: float) -> dict[str, float]:
    return {
        "seconds": seconds,
        "patches_per_second": patches / seconds if seconds else 0.0,
        "volumes_per_second": volumes / seconds if seconds else 0.0,
    }


def _by_volume(parts: Sequence[tuple[Mapping[int, float], int]]) -> ByVolume:
    """The sum of figures by volume, each with its sign, when somebody looks."""

    def total() -> np.ndarray[Any, Any]:
        arrays = [(ByVolume.of(part).array, sign) for part, sign in parts]
        length = max((len(array) for array, _ in arrays), default=0)
        whole = np.zeros(length, np.result_type(np.int64, *(array for array, _ in arrays)))
        for array, sign in arrays:
            if sign > 0:
                whole[: len(array)] += array
            else:
                whole[: len(array)] -= array
        return whole

    return ByVolume(total)


def as_plain(stats: QueueStats) -> dict[str, Any]:
    """Statistics as plain Python values, which a checkpoint can hold."""
    plain = {f.name: getattr(stats, f.name) for f in fields(stats)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in plain.items()}


def from_plain(plain: Mapping[str, Any]) -> QueueStats:
    """The statistics that :func:`as_plain` was given; what it lacks has its default, what is not known is left out.

    Example:
        >>> from_plain(as_plain(QueueStats(batches=3))).batches
        3
    """
    known: dict[str, Any] = {f.name: plain[f.name] for f in fields(QueueStats) if f.name in plain}
    known |= {name: ByVolume.of(known[name]) for name in _BY_VOLUME if name in known}
    return QueueStats(**known)
