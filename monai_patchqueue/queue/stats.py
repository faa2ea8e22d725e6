# SPDX-License-Identifier: Apache-2.0
"""Figures of a queue: a recorder that is written to while it runs, and the frozen statistics that users read."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

__all__ = ["QueueStats", "Recorder"]

_STAGES = ("load", "sample", "write")


@dataclass(frozen=True)
class QueueStats:
    """A queue's figures since its loader was made, as ``loader.stats()`` gives them.

    Attributes:
        epoch: epoch under way, or the last one.
        batches: batches handed out.
        patches: patches handed out.
        volumes: volumes prepared.
        fill: patches that are ready, as a share of ``queue_length``, 0 to 1.
        queue_length: size of the window in patches; 0 before it is known.
        patches_per_second: patches handed out per second of epochs under way: from an epoch's first request for a batch
            to its last batch, so that validation between epochs does not count.
        volumes_per_second: volumes prepared per second of the same time.
        wait_seconds: mean time that the consumer waited for a batch.
        last_wait_seconds: time that it waited for the last batch.
        max_wait_seconds: the longest time that it waited for a batch.
        starved: share of that time which the consumer spent waiting for batches, 0 to 1.
        load_seconds: mean time per volume, in the workers, of loading and transforms but sampling.
        sample_seconds: mean time per volume of multi-sample transforms: choosing centers and cropping.
        write_seconds: mean time per volume of writing patches into their slots.
        slab_bytes: size of the slab.
        failures: volumes that could not be prepared, and were replaced.
        lost_draws: draws that epochs were longer than ``len(loader)`` says, on this rank, and that were left out.
        extra_draws: draws that epochs were shorter, and that were made again.
        volume_counts: patches handed out of each volume, by its index in the dataset.
        failure_counts: how often each volume failed, by its index in the dataset.
    """

    epoch: int = 0
    batches: int = 0
    patches: int = 0
    volumes: int = 0
    fill: float = 0.0
    queue_length: int = 0
    patches_per_second: float = 0.0
    volumes_per_second: float = 0.0
    wait_seconds: float = 0.0
    last_wait_seconds: float = 0.0
    max_wait_seconds: float = 0.0
    starved: float = 0.0
    load_seconds: float = 0.0
    sample_seconds: float = 0.0
    write_seconds: float = 0.0
    slab_bytes: int = 0
    failures: int = 0
    lost_draws: int = 0
    extra_draws: int = 0
    volume_counts: Mapping[int, int] = field(default_factory=dict)
    failure_counts: Mapping[int, int] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """All figures but those by volume, as floats by name.

        Example:
            >>> QueueStats(fill=0.5).scalars()["fill"]
            0.5
        """
        return {f.name: float(getattr(self, f.name)) for f in fields(self) if not f.name.endswith("_counts")}

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch}: {self.patches} patches of {self.volumes} volumes, {self.patches_per_second:.1f} "
            "patches/s, "
            f"queue {self.fill:.0%} full, starved {self.starved:.0%} of the time"
        )


class Recorder:
    """Where the queue notes what happens; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._volumes = 0
        self._stages = dict.fromkeys(_STAGES, 0.0)
        self._batches = 0
        self._counts: Counter[int] = Counter()
        self._failures: Counter[int] = Counter()
        self._lost_draws = 0
        self._extra_draws = 0
        self._elapsed = 0.0
        self._mark = 0.0
        self._wait = 0.0
        self._last_wait = 0.0
        self._max_wait = 0.0

    def prepared(self, seconds: Mapping[str, float]) -> None:
        """A volume's patches are in their slots."""
        with self._lock:
            self._volumes += 1
            for stage in _STAGES:
                self._stages[stage] += seconds.get(stage, 0.0)

    def failed(self, volume: int) -> None:
        """A volume could not be prepared."""
        with self._lock:
            self._failures[volume] += 1

    def opened(self, natural_draws: int, num_draws: int) -> None:
        """An epoch begins whose order gives so many draws, of which so many are made."""
        with self._lock:
            self._lost_draws += max(natural_draws - num_draws, 0)
            self._extra_draws += max(num_draws - natural_draws, 0)

    def requested(self, first: bool) -> float:
        """The consumer asks for a batch, the ``first`` that it gets from its iterator or a later one."""
        now = time.perf_counter()
        if first:
            self._mark = now
        return now

    def delivered(self, requested: float, volumes: Mapping[int, int]) -> None:
        """The consumer has got the batch it asked for, with so many patches of each volume."""
        now = time.perf_counter()
        with self._lock:
            self._batches += 1
            self._counts.update(volumes)
            self._elapsed += now - self._mark
            self._mark = now
            self._last_wait = now - requested
            self._wait += self._last_wait
            self._max_wait = max(self._max_wait, self._last_wait)

    def stats(self, *, epoch: int, ready: int, queue_length: int, slab_bytes: int) -> QueueStats:
        """The figures now."""
        with self._lock:
            elapsed = self._elapsed
            patches = self._counts.total()
            volumes = self._volumes or 1
            return QueueStats(
                epoch=epoch,
                batches=self._batches,
                patches=patches,
                volumes=self._volumes,
                fill=min(ready / queue_length, 1.0) if queue_length else 0.0,
                queue_length=queue_length,
                patches_per_second=patches / elapsed if elapsed else 0.0,
                volumes_per_second=self._volumes / elapsed if elapsed else 0.0,
                wait_seconds=self._wait / self._batches if self._batches else 0.0,
                last_wait_seconds=self._last_wait,
                max_wait_seconds=self._max_wait,
                starved=min(self._wait / elapsed, 1.0) if elapsed else 0.0,
                load_seconds=self._stages["load"] / volumes,
                sample_seconds=self._stages["sample"] / volumes,
                write_seconds=self._stages["write"] / volumes,
                slab_bytes=slab_bytes,
                failures=self._failures.total(),
                lost_draws=self._lost_draws,
                extra_draws=self._extra_draws,
                volume_counts=MappingProxyType(dict(self._counts)),
                failure_counts=MappingProxyType(dict(self._failures)),
            )
