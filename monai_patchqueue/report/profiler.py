# SPDX-License-Identifier: Apache-2.0
"""Measures a pipeline's stages by short runs of its queue, so that other settings can be predicted."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data import PatchQueueLoader
from ..data.volumes import sample_count_holder
from ..queue.settings import LoaderSettings
from ..queue.stats import QueueStats
from .bundle_loader import as_queue_loader
from .diagnosis import stage_times
from .model import StageTimes

__all__ = ["Measurement", "PipelineProfile", "measure", "num_samples_set_to", "profile_pipeline"]

# More than that need more memory than they tell anything new.
_MOST_WORKERS = 8
# After as many volumes as there are workers: the first has to do what no other has (imports, opening of files).
_VOLUMES_PER_WORKER = 3


@dataclass(frozen=True)
class Measurement:
    """A run of a loader whose consumer does nothing, or sleeps for a step.

    Attributes:
        settings: that it ran with.
        stats: its figures, without the first volume of each worker.
        others: processors that other programs kept busy meanwhile.
        patches_per_second: that its workers prepared, which go on to fill the queue while batches are drawn from it.
    """

    settings: LoaderSettings
    stats: QueueStats
    patches_per_second: float
    others: float


@dataclass(frozen=True)
class PipelineProfile:
    """What is known of a pipeline after it was measured.

    Attributes:
        settings: of its loader, as it is.
        times: of its stages.
        stats: of the run with one worker.
        runs: all runs.
        own_patches_per_second: of the loader as it is, where that is not a ``PatchQueueLoader``.
        others: processors that other programs kept busy meanwhile.
    """

    settings: LoaderSettings
    times: StageTimes
    stats: QueueStats
    runs: tuple[Measurement, ...]
    own_patches_per_second: float | None = None
    others: float = 0.0


def profile_pipeline(
    loader: DataLoader[Any], seconds: float = 3.0, step: float = 0.0, progress: bool = True
) -> PipelineProfile:
    """Run a loader's pipeline for a few seconds in a queue, and take its stages' times.

    One run has one worker; one, two samples where there was one, which tells apart what a volume takes and what a
    patch does; one, as many workers as there are processors (but 8 at most), which tells how much they slow each other
    down.

    Args:
        loader: any ``DataLoader`` over a map-style dataset; it is left as it was.
        seconds: of each run, at least; each worker prepares a few volumes in any case.
        step: seconds of the consumer's own work on a batch, for what is predicted later.
        progress: show progress bars.
    """
    samples = getattr(sample_count_holder(loader.dataset), "num_samples", None)
    with as_queue_loader(loader) as queue:
        settings = queue.settings()
    num_workers = max(min(math.ceil(settings.cpus), settings.volumes, _MOST_WORKERS), 1)
    alone = measure(loader, seconds, progress, num_workers=1)
    runs, doubled = [alone], None
    if samples is not None:
        doubled = measure(loader, seconds, progress, num_workers=1, samples_per_volume=2 * samples)
        runs.append(doubled)
    if num_workers > 1:
        runs.append(measure(loader, seconds, progress, num_workers=num_workers))
    times = _fit(alone, doubled, runs[-1])
    own = None if isinstance(loader, PatchQueueLoader) else _own_rate(loader, seconds, progress)
    settings = replace(settings, patch_nbytes=alone.settings.patch_nbytes)
    others = sum(run.others for run in runs) / len(runs)
    return PipelineProfile(settings, replace(times, step=step), alone.stats, tuple(runs), own, others)


def measure(
    loader: DataLoader[Any], seconds: float, progress: bool = True, step: float = 0.0, **changes: Any
) -> Measurement:
    """Run a loader's dataset in a queue for a while, with changed arguments.

    Args:
        loader: any ``DataLoader`` over a map-style dataset.
        seconds: to run for, at least.
        progress: show a progress bar.
        step: seconds to sleep after each batch.
        changes: arguments of ``PatchQueueLoader``; ``samples_per_volume`` is set in the dataset's transform.
    """
    samples = changes.pop("samples_per_volume", None)
    with num_samples_set_to(loader.dataset, samples), as_queue_loader(loader, seed=0, **changes) as queue:
        workers = max(queue.num_workers, 1)
        words = f"{workers} worker{'s' if workers > 1 else ''}" + (f", {samples} samples a volume" if samples else "")
        warm, others = None, _OtherPrograms()
        with _Progress(words, seconds, progress) as passed:
            for _ in chain.from_iterable(repeat(queue)):
                time.sleep(step)
                stats = queue.stats()
                if warm is None and stats.volumes >= workers:
                    warm = stats
                if passed() >= seconds and warm and stats.volumes >= warm.volumes + _VOLUMES_PER_WORKER * workers:
                    break
            stats, settings = queue.stats(), queue.settings()
        apart = settings.worker_type == "process" and settings.num_workers > 0
        busy = others(stats.volumes * stats.cpu_seconds if apart else 0.0)
    since = _since(warm or QueueStats(), stats)
    rate = since.volumes_per_second * settings.samples_per_volume * settings.repeats
    return Measurement(settings, since, rate, busy)


@contextmanager
def num_samples_set_to(dataset: Any, samples: int | None) -> Iterator[None]:
    """Let a dataset's transform take another number of patches of each volume within the block."""
    holder = sample_count_holder(dataset)
    if samples is None or holder is None:
        yield
        return
    before = holder.num_samples
    holder.num_samples = samples
    try:
        yield
    finally:
        holder.num_samples = before


def _since(before: QueueStats, after: QueueStats) -> QueueStats:
    """The figures of what came between: means per volume and per batch, rates and shares of the time."""
    seconds, volumes = after.seconds - before.seconds, after.volumes - before.volumes

    def mean(many: float, few: float, unit: str) -> float:
        units: tuple[int, int] = getattr(after, unit), getattr(before, unit)
        return max(many * units[0] - few * units[1], 0.0) / max(units[0] - units[1], 1)

    means: dict[str, Any] = {
        name: mean(getattr(after, name), getattr(before, name), unit)
        for unit, names in (("volumes", _BY_VOLUME), ("batches", _BY_BATCH))
        for name in names
    }
    means["transform_seconds"] = {
        name: mean(value, before.transform_seconds.get(name, 0.0), "volumes")
        for name, value in after.transform_seconds.items()
    }
    return replace(
        after,
        seconds=seconds,
        volumes=volumes,
        batches=after.batches - before.batches,
        patches=after.patches - before.patches,
        volumes_per_second=volumes / seconds if seconds else 0.0,
        patches_per_second=(after.patches - before.patches) / seconds if seconds else 0.0,
        **means,
    )


def _fit(alone: Measurement, doubled: Measurement | None, together: Measurement) -> StageTimes:
    """Stage times that agree with runs of one worker, of one with twice the samples, and of several."""
    times = stage_times(alone.stats, alone.settings)
    samples = alone.settings.samples_per_volume
    if doubled is not None:
        patch, volume = _line(_volume_seconds(alone), _volume_seconds(doubled), samples)
        patch_cpu, volume_cpu = _line(alone.stats.cpu_seconds, doubled.stats.cpu_seconds, samples)
        times = replace(
            times,
            patch=patch,
            volume=volume,
            patch_cpu=min(patch_cpu, patch),
            volume_cpu=min(volume_cpu, volume),
        )
    busy = min(together.settings.num_workers, together.settings.cpus) - 1
    if busy > 0 and alone.stats.cpu_seconds:
        longer = _volume_seconds(together) - _volume_seconds(alone)
        times = replace(times, contention=max(longer, 0.0) / alone.stats.cpu_seconds / busy)
    return times


def _line(one: float, two: float, samples: float) -> tuple[float, float]:
    """Slope and start of what takes ``one`` second with so many samples, and ``two`` with twice as many."""
    slope = min(max((two - one) / samples, 0.0), one / samples)
    return slope, one - slope * samples


def _volume_seconds(run: Measurement) -> float:
    return run.stats.load_seconds + run.stats.sample_seconds + run.stats.write_seconds


def _own_rate(loader: DataLoader[Any], seconds: float, progress: bool) -> float:
    """Patches per second of a loader that keeps no figures, after its first batch."""
    patches, first = 0, 0.0
    with _Progress(f"the bundle's own {type(loader).__name__}", seconds, progress) as passed:
        for number, batch in enumerate(chain.from_iterable(repeat(loader))):
            if number == 0:
                first = passed()
                continue
            patches += _patches_in(batch)
            if passed() >= seconds + first and number >= 2 * max(loader.num_workers, 1):
                break
        return patches / (passed() - first)


def _patches_in(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next((len(value) for value in values if isinstance(value, torch.Tensor)), 1)


class _OtherPrograms:
    """Processors that programs other than this one have kept busy since it was made."""

    def __init__(self) -> None:
        self._start, self._own, self._all = time.monotonic(), time.process_time(), self._busy()

    @staticmethod
    def _busy() -> float:
        times = psutil.cpu_times()
        idle: float = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "guest", 0.0)
        return sum(times) - idle  # a guest's time is part of user time

    def __call__(self, workers: float) -> float:
        """That number, when worker processes have taken so many seconds of processors."""
        own = time.process_time() - self._own + workers
        return max(self._busy() - self._all - own, 0.0) / (time.monotonic() - self._start)


class _Progress:
    """A bar of seconds; called, it says how many have passed."""

    def __init__(self, words: str, seconds: float, show: bool) -> None:
        self._most = round(seconds, 1)
        self._shown = 0.0
        self._bar = tqdm(
            total=self._most,
            desc=f"measuring {words}",
            disable=not show,
            leave=False,
            bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed}",
        )
        self._start = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __call__(self) -> float:
        seconds = time.monotonic() - self._start
        self._bar.update(min(seconds, self._most) - self._shown)
        self._shown = min(seconds, self._most)
        return seconds

    def __exit__(self, *_: object) -> None:
        self._bar.close()


_BY_VOLUME = ("load_seconds", "sample_seconds", "write_seconds", "cpu_seconds")
_BY_BATCH = (
    "wait_seconds",
    "step_seconds",
    "assemble_seconds",
    "item_transform_seconds",
    "batch_transform_seconds",
    "consumer_cpu_seconds",
)
