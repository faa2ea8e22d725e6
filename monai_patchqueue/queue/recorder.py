# SPDX-License-Identifier: Apache-2.0
"""Where a queue notes what happens while it runs; statistics are read off it."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from .stats import ByVolume, QueueStats

__all__ = ["Recorder"]

_STAGES = ("load", "sample", "write")
_ASSEMBLY = ("assembly", "item_transform", "batch_transform")
# A consumer that waits less is not kept waiting: even when all is well, a batch takes some time to be handed over.
_STARVED = 0.05
# Whoever is busy less is not what others wait for.
_BUSY = 0.5


class Recorder:
    """Where the queue notes what happens; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._volumes = 0
        self._stages = dict.fromkeys(_STAGES, 0.0)
        self._transforms: Counter[str] = Counter()
        self._batches = 0
        self._assembly = dict.fromkeys(_ASSEMBLY, 0.0)
        self._patches = 0
        self._new = 0  # patches drawn for the first time
        self._age = 0  # batches that they had been in a random queue
        self._mixed = 0  # volumes in batches
        self._counts = np.zeros(0, np.int64)
        self._unshared = sys.getrefcount(self._counts)
        self._seen = 0  # volumes with a count
        self._levels: Counter[int] = Counter()  # and how many of them have which
        self._failed = 0
        self._failures = np.zeros(0, np.int64)
        self._expected = np.zeros(0)  # draws of each volume by now, without the epoch under way
        self._asked = np.zeros(0)  # shares of its draws that the epoch's order asks for
        self._drawn = 0  # in this epoch
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
        self._first_wait = 0.0
        self._epoch_waits = 0.0
        self._epochs = 0  # of which a batch was delivered
        self._is_first = True  # the next batch is the first of its epoch
        self._worker_cpu = 0.0
        self._longest = 0.0
        self._cpu = 0.0
        self._cpu_mark = 0.0

    def prepared(self, seconds: Mapping[str, float], transforms: Mapping[str, float] | None = None) -> None:
        """A volume's patches are in their slots; how long each stage and each transform took, and processors in all."""
        now = time.perf_counter()
        with self._lock:
            self._volumes += 1
            for stage in _STAGES:
                self._stages[stage] += seconds.get(stage, 0.0)
            self._transforms.update(transforms or {})
            total = sum(seconds.get(stage, 0.0) for stage in _STAGES)
            self._work.append((now - total, now))
            self._longest = max(self._longest, total)
            self._worker_cpu += seconds.get("cpu", 0.0)

    def assembled(self, seconds: Mapping[str, float]) -> None:
        """A batch is ready; how long each part of its assembly took."""
        with self._lock:
            self._assembled += 1
            for part in _ASSEMBLY:
                self._assembly[part] += seconds.get(part, 0.0)

    def failed(self, volume: int) -> None:
        """A volume could not be prepared."""
        with self._lock:
            self._failed += 1
            self._failures = _grown(self._failures, volume).copy()  # statistics refer to the one before
            self._failures[volume] += 1

    def opened(self, natural_draws: int, num_draws: int, asked: np.ndarray[Any, Any] | None = None) -> None:
        """An epoch begins whose order gives so many draws, of which so many are made.

        ``asked`` has the draws of each volume that the order asks for.
        """
        with self._lock:
            self._lost_draws += max(natural_draws - num_draws, 0)
            self._extra_draws += max(num_draws - natural_draws, 0)
            self._expected, self._drawn = _expected(self._expected, self._asked, self._drawn), 0
            self._asked = np.zeros(0) if asked is None else asked / max(asked.sum(), 1)

    def requested(self, first: bool) -> float:
        """The consumer asks for a batch, the ``first`` that it gets from its iterator or a later one."""
        now = time.perf_counter()
        with self._lock:
            if first:
                self._settle()
                self._began = self._mark = now
                self._cpu_mark = time.process_time()
                self._is_first = True
            else:
                self._steps += 1
                self._stepped += now - self._mark
        return now

    def delivered(self, requested: float, volumes: Mapping[int, int], new: int | None = None, age: int = 0) -> None:
        """The consumer has got the batch it asked for, with so many patches of each volume.

        ``new`` of them were never drawn before; by default all of them. Together they had been in the queue for ``age``
        batches.
        """
        now = time.perf_counter()
        patches = sum(volumes.values())
        with self._lock:
            self._batches += 1
            self._patches += patches
            self._drawn += patches
            self._new += patches if new is None else new
            self._age += age
            self._mixed += len(volumes)
            self._count(volumes)
            self._elapsed += now - self._mark
            self._mark = now
            self._settle()
            self._last_wait = now - requested
            self._wait += self._last_wait
            self._max_wait = max(self._max_wait, self._last_wait)
            self._note_first_wait()
            cpu = time.process_time()
            self._cpu += cpu - self._cpu_mark
            self._cpu_mark = cpu

    def _count(self, volumes: Mapping[int, int]) -> None:
        self._counts = _grown(self._counts, max(volumes, default=-1))
        if sys.getrefcount(self._counts) > self._unshared:  # statistics that somebody keeps refer to it
            self._counts = self._counts.copy()
        counts, levels = self._counts, self._levels
        for volume, count in volumes.items():
            before = int(counts[volume])
            counts[volume] = before + count
            levels[before + count] += 1
            if not before:
                self._seen += 1
            elif levels[before] > 1:
                levels[before] -= 1
            else:
                del levels[before]

    def _note_first_wait(self) -> None:
        if self._is_first:
            self._is_first = False
            self._epochs += 1
            if self._epochs == 1:
                self._first_wait = self._last_wait
            else:
                self._epoch_waits += self._last_wait

    def _settle(self) -> None:
        """Count the work that fell into the epoch, up to its last batch: between epochs nobody is kept waiting."""
        self._worked += sum(max(min(end, self._mark) - max(begin, self._began), 0.0) for begin, end in self._work)
        self._work.clear()

    def stats(
        self,
        *,
        epoch: int,
        ready: int,
        queue_length: int,
        slab_bytes: int,
        num_workers: int = 0,
        workers_apart: bool = False,
    ) -> QueueStats:
        """The figures now; ``workers_apart`` where workers are processes of their own."""
        with self._lock:
            elapsed = self._elapsed
            patches = self._patches
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
                volumes_per_batch=self._mixed / self._batches if self._batches else 0.0,
                reuse=patches / self._new if self._new else 0.0,
                age=self._age / patches if patches else 0.0,
                seconds=elapsed,
                wait_seconds=self._wait / self._batches if self._batches else 0.0,
                last_wait_seconds=self._last_wait,
                max_wait_seconds=self._max_wait,
                first_wait_seconds=self._first_wait,
                epoch_wait_seconds=self._epoch_waits / max(self._epochs - 1, 1),
                starved=self._share(self._wait),
                load_seconds=self._stages["load"] / volumes,
                sample_seconds=self._stages["sample"] / volumes,
                write_seconds=self._stages["write"] / volumes,
                cpu_seconds=self._worker_cpu / volumes,
                max_volume_seconds=self._longest,
                assemble_seconds=self._assembly["assembly"] / assembled,
                item_transform_seconds=self._assembly["item_transform"] / assembled,
                batch_transform_seconds=self._assembly["batch_transform"] / assembled,
                step_seconds=self._stepped / self._steps if self._steps else 0.0,
                consumer_cpu_seconds=max(self._cpu - (0.0 if workers_apart else self._worker_cpu), 0.0)
                / (self._batches or 1),
                worker_busy=self._share(self._worked / max(num_workers, 1)),
                assembly_busy=self._share(sum(self._assembly.values())),
                num_workers=num_workers,
                slab_bytes=slab_bytes,
                failures=self._failed,
                lost_draws=self._lost_draws,
                extra_draws=self._extra_draws,
                volumes_seen=self._seen,
                volume_patches_min=min(self._levels, default=0),
                volume_patches_max=max(self._levels, default=0),
                volume_counts=ByVolume(self._counts),
                volume_expected=ByVolume(partial(_expected, self._expected, self._asked, self._drawn)),
                failure_counts=ByVolume(self._failures),
                transform_seconds={name: seconds / volumes for name, seconds in self._transforms.items()},
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


def _expected(before: np.ndarray[Any, Any], asked: np.ndarray[Any, Any], drawn: int) -> np.ndarray[Any, Any]:
    """Draws of each volume by now: those of epochs before, and this one's by the shares that its order asks for."""
    expected: np.ndarray[Any, Any] = _grown(before, len(asked) - 1).copy()
    expected[: len(asked)] += asked * drawn
    return expected


def _grown(values: np.ndarray[Any, Any], index: int) -> np.ndarray[Any, Any]:
    """The values, or a longer copy of them where there is no place for ``index``."""
    if index < len(values):
        return values
    grown = np.zeros(max(2 * len(values), index + 1), values.dtype)
    grown[: len(values)] = values
    return grown
