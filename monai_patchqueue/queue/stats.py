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
_ASSEMBLY = ("assembly", "item_transform", "batch_transform")
# A consumer that waits less is not kept waiting: even when all is well, a batch takes some time to be handed over.
_STARVED = 0.05
# Whoever is busy less is not what others wait for.
_BUSY = 0.5


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
        assemble_seconds: mean time per batch of gathering its patches and collating them.
        item_transform_seconds: mean time per batch of ``item_transform``.
        batch_transform_seconds: mean time per batch of ``batch_transform``.
        step_seconds: mean time from a batch's delivery to the request for the next: the consumer's own work.
        worker_busy: share of their time that the workers spent preparing volumes, 0 to 1.
        assembly_busy: share of the time in which batches were assembled, 0 to 1.
        num_workers: volumes prepared at the same time; 0: the consumer prepares them itself.
        slab_bytes: size of the slab.
        failures: volumes that could not be prepared, and were replaced.
        lost_draws: draws that epochs were longer than ``len(loader)`` says, on this rank, and that were left out.
        extra_draws: draws that epochs were shorter, and that were made again.
        volume_counts: patches handed out of each volume, by its index in the dataset.
        failure_counts: how often each volume failed, by its index in the dataset.
        transform_seconds: mean time per volume by transform, in the pipeline's order: each transform of the dataset's
            ``Compose``, under its class's name (``"RandFlipd#2"`` for the second of a name), and ``patch_transform``.
            What the dataset itself takes, reading from a cache for instance, or resampling that a lazy pipeline put
            off, comes first, under the dataset's class. The sum is ``load_seconds + sample_seconds``.
        bottleneck: what keeps batches from coming faster. ``"consumer"``: training itself, which waits less than 5 %
            of the time. Else whoever is busy for the larger share of the time: ``"workers:LoadImaged"`` with the
            transform that takes longest (or ``"workers:write"``), or ``"assembly"``, ``"item_transform"``,
            ``"batch_transform"``. ``"queue"``: none of them is busy half of the time, so that volumes wait for room or
            for a slow one before them. ``"unknown"`` before the first batch.
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
    assemble_seconds: float = 0.0
    item_transform_seconds: float = 0.0
    batch_transform_seconds: float = 0.0
    step_seconds: float = 0.0
    worker_busy: float = 0.0
    assembly_busy: float = 0.0
    num_workers: int = 0
    slab_bytes: int = 0
    failures: int = 0
    lost_draws: int = 0
    extra_draws: int = 0
    volume_counts: Mapping[int, int] = field(default_factory=dict)
    failure_counts: Mapping[int, int] = field(default_factory=dict)
    transform_seconds: Mapping[str, float] = field(default_factory=dict)
    bottleneck: str = "unknown"

    def scalars(self) -> dict[str, float]:
        """The figures that are numbers, as floats by name.

        Example:
            >>> QueueStats(fill=0.5).scalars()["fill"]
            0.5
        """
        return {name: float(getattr(self, name)) for name in _SCALARS}

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch}: {self.patches} patches of {self.volumes} volumes, {self.patches_per_second:.1f} "
            "patches/s, "
            f"queue {self.fill:.0%} full, starved {self.starved:.0%} of the time"
        )


_SCALARS = tuple(f.name for f in fields(QueueStats) if isinstance(f.default, (int, float)))


class Recorder:
    """Where the queue notes what happens; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._volumes = 0
        self._stages = dict.fromkeys(_STAGES, 0.0)
        self._transforms: Counter[str] = Counter()
        self._batches = 0
        self._assembly = dict.fromkeys(_ASSEMBLY, 0.0)
        self._counts: Counter[int] = Counter()
        self._failures: Counter[int] = Counter()
        self._lost_draws = 0
        self._extra_draws = 0
        self._elapsed = 0.0
        self._began = 0.0  # when the epoch under way began, or the last one
        self._mark = 0.0  # when its last batch was delivered
        self._work: list[tuple[float, float]] = []  # begin and end of workers' work since then
        self._worked = 0.0
        self._assembled = 0
        self._steps = 0
        self._stepped = 0.0
        self._wait = 0.0
        self._last_wait = 0.0
        self._max_wait = 0.0

    def prepared(self, seconds: Mapping[str, float], transforms: Mapping[str, float] | None = None) -> None:
        """A volume's patches are in their slots; how long each stage and each transform took."""
        now = time.perf_counter()
        with self._lock:
            self._volumes += 1
            for stage in _STAGES:
                self._stages[stage] += seconds.get(stage, 0.0)
            self._transforms.update(transforms or {})
            self._work.append((now - sum(seconds.values()), now))

    def assembled(self, seconds: Mapping[str, float]) -> None:
        """A batch is ready; how long each part of its assembly took."""
        with self._lock:
            self._assembled += 1
            for part in _ASSEMBLY:
                self._assembly[part] += seconds.get(part, 0.0)

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
        with self._lock:
            if first:
                self._settle()
                self._began = self._mark = now
            else:
                self._steps += 1
                self._stepped += now - self._mark
        return now

    def delivered(self, requested: float, volumes: Mapping[int, int]) -> None:
        """The consumer has got the batch it asked for, with so many patches of each volume."""
        now = time.perf_counter()
        with self._lock:
            self._batches += 1
            self._counts.update(volumes)
            self._elapsed += now - self._mark
            self._mark = now
            self._settle()
            self._last_wait = now - requested
            self._wait += self._last_wait
            self._max_wait = max(self._max_wait, self._last_wait)

    def _settle(self) -> None:
        """Count the work that fell into the epoch, up to its last batch: between epochs nobody is kept waiting."""
        self._worked += sum(max(min(end, self._mark) - max(begin, self._began), 0.0) for begin, end in self._work)
        self._work.clear()

    def stats(self, *, epoch: int, ready: int, queue_length: int, slab_bytes: int, num_workers: int = 0) -> QueueStats:
        """The figures now."""
        with self._lock:
            elapsed = self._elapsed
            patches = self._counts.total()
            volumes = self._volumes or 1
            assembled = self._assembled or 1
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
                starved=self._share(self._wait),
                load_seconds=self._stages["load"] / volumes,
                sample_seconds=self._stages["sample"] / volumes,
                write_seconds=self._stages["write"] / volumes,
                assemble_seconds=self._assembly["assembly"] / assembled,
                item_transform_seconds=self._assembly["item_transform"] / assembled,
                batch_transform_seconds=self._assembly["batch_transform"] / assembled,
                step_seconds=self._stepped / self._steps if self._steps else 0.0,
                worker_busy=self._share(self._worked / max(num_workers, 1)),
                assembly_busy=self._share(sum(self._assembly.values())),
                num_workers=num_workers,
                slab_bytes=slab_bytes,
                failures=self._failures.total(),
                lost_draws=self._lost_draws,
                extra_draws=self._extra_draws,
                volume_counts=MappingProxyType(dict(self._counts)),
                failure_counts=MappingProxyType(dict(self._failures)),
                transform_seconds=MappingProxyType(
                    {name: seconds / volumes for name, seconds in self._transforms.items()}
                ),
                bottleneck=self._bottleneck(num_workers),
            )

    def _share(self, seconds: float) -> float:
        return min(seconds / self._elapsed, 1.0) if self._elapsed else 0.0

    def _bottleneck(self, num_workers: int) -> str:
        if not self._batches:
            return "unknown"
        if self._share(self._wait) < _STARVED:
            return "consumer"
        workers, assembly = self._worked / max(num_workers, 1), sum(self._assembly.values())
        if num_workers and self._share(max(workers, assembly)) < _BUSY:
            return "queue"
        if assembly > workers:
            return max(self._assembly, key=self._assembly.__getitem__)
        transforms = {**self._transforms, "write": self._stages["write"]}
        return f"workers:{max(transforms, key=transforms.__getitem__)}"
