# SPDX-License-Identifier: Apache-2.0
"""Statistics of several queues as one: of runs one after the other, or of ranks side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from .stats import ByVolume, QueueStats

__all__ = ["as_plain", "combined", "from_plain"]

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
    "seconds": ("starved", "worker_busy", "assembly_busy"),
}
_LARGEST = ("max_wait_seconds", "first_wait_seconds", "max_volume_seconds")
_WEIGHTS = {figure: weight for weight, figures in _MEANS.items() for figure in figures}
_BY_VOLUME = ("volume_counts", "volume_expected", "failure_counts")


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
    signed = [*((part, 1) for part in parts), *((part, -1) for part in without)]
    values: dict[str, Any] = {name: max(sum(getattr(p, name) * s for p, s in signed), 0) for name in _COUNTED}
    seconds = sum(p.seconds * s for p, s in signed)
    for name, weight in _WEIGHTS.items():
        total = sum(getattr(p, weight) * s for p, s in signed)
        values[name] = sum(getattr(p, name) * getattr(p, weight) * s for p, s in signed) / total if total > 0 else 0.0
    transforms: defaultdict[str, float] = defaultdict(float)
    for part, sign in signed:
        for name, mean in part.transform_seconds.items():
            transforms[name] += mean * part.volumes * sign
    new = sum(p.patches / p.reuse * s for p, s in signed if p.reuse)
    last = parts[-1]
    values |= {
        "transform_seconds": {name: total / (values["volumes"] or 1) for name, total in transforms.items()},
        "reuse": values["patches"] / new if new > 0 else 0.0,
        **{name: max(getattr(p, name) for p in parts) for name in _LARGEST},
        "seconds": max(seconds, 0.0),
        **{name: getattr(last, name) for name in ("epoch", "last_wait_seconds", "fill", "bottleneck")},
        **{name: getattr(last, name) for name in ("queue_length", "num_workers", "slab_bytes")},
        **{name: _by_volume([(getattr(p, name), s) for p, s in signed]) for name in _BY_VOLUME},
    }
    if ranks:
        values["seconds"] = seconds / len(parts)
        values["epoch"] = max(p.epoch for p in parts)
        values["bottleneck"] = max(parts, key=lambda p: p.starved).bottleneck
        values |= {name: sum(getattr(p, name) for p in parts) for name in ("queue_length", "num_workers", "slab_bytes")}
        values |= {name: sum(getattr(p, name) for p in parts) / len(parts) for name in ("fill", "last_wait_seconds")}
    seen = values["volume_counts"].array[values["volume_counts"].array > 0]
    values |= {"volumes_seen": len(seen), "volume_patches_min": 0, "volume_patches_max": 0}
    if len(seen):
        values |= {"volume_patches_min": int(seen.min()), "volume_patches_max": int(seen.max())}
    for rate, count in (("patches_per_second", "patches"), ("volumes_per_second", "volumes")):
        values[rate] = values[count] / values["seconds"] if values["seconds"] else 0.0
    return QueueStats(**values)


def _by_volume(parts: Sequence[tuple[Mapping[int, float], int]]) -> ByVolume:
    arrays = [ByVolume.of(part).array * sign for part, sign in parts]
    total = np.zeros(max(map(len, arrays), default=0), np.result_type(np.int64, *arrays))
    for array in arrays:
        total[: len(array)] += array
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
