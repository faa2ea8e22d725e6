# SPDX-License-Identifier: Apache-2.0
"""What a pipeline can deliver, from the times of its stages: the slowest stage decides.

Pure arithmetic; ``docs/diagnosis.md`` states it in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from ..queue.settings import LoaderSettings

__all__ = ["StageTimes", "capacities", "covers_longest", "deliverable", "demand", "expected_starved", "mixing"]


@dataclass(frozen=True)
class StageTimes:
    """What each stage of a pipeline takes, in seconds, by unit of its work.

    Attributes:
        volume: of a worker per volume, however many patches it gives.
        patch: of a worker per patch, besides.
        volume_cpu: of a processor, within ``volume``; the rest is waiting, for storage as a rule.
        patch_cpu: of a processor, within ``patch``.
        assembly: of the assembling thread per batch, the loader's transforms included.
        item_transform: within that, of ``item_transform``.
        step: of the consumer per batch, waiting for it apart.
        consumer_cpu: of processors per batch, in the consumer's process: assembling and the consumer's own work.
        longest: of a worker for the slowest of the volumes, its patches included.
        epoch_start: of the consumer at each new epoch, waiting for the first batch, where workers do not persist.
        contention: by how much, as a share, computing takes longer with each further processor that is busy: they share
            caches and memory, and what other programs leave of them.
        threads_cpus: processors that thread workers are known to have kept busy at once; they share an interpreter.
    """

    volume: float
    patch: float = 0.0
    volume_cpu: float = 0.0
    patch_cpu: float = 0.0
    assembly: float = 0.0
    item_transform: float = 0.0
    step: float = 0.0
    consumer_cpu: float = 0.0
    longest: float = 0.0
    epoch_start: float = 0.0
    contention: float = 0.0
    threads_cpus: float = 1.0

    def of_volume(self, samples: float, busy_cpus: float = 1.0) -> float:
        """Seconds that a worker takes to prepare a volume that gives ``samples`` patches."""
        waiting = max(self.volume - self.volume_cpu, 0.0) + samples * max(self.patch - self.patch_cpu, 0.0)
        return waiting + self.cpu_of_volume(samples, busy_cpus)

    def cpu_of_volume(self, samples: float, busy_cpus: float = 1.0) -> float:
        """Processor seconds within that."""
        alone = self.volume_cpu + samples * self.patch_cpu
        return alone * (1 + self.contention * max(busy_cpus - 1, 0.0))


def capacities(times: StageTimes, settings: LoaderSettings) -> dict[str, float]:
    """What each stage could deliver if the others took no time, in patches per second.

    With n samples per volume, r repeats, batches of B, W workers, C processors:

    - workers: W · n · r / t(n), where t(n) is what a worker takes for a volume;
    - cpus: C / (c(n) / (n · r) + m / B), where c(n) is the processor time in t(n), and m that of the consumer's
      process per batch;
    - assembly: B / (seconds in which the one thread that does so assembles a batch);
    - step: B / (seconds of the consumer's own work on a batch).

    Without workers, everything is done in turn, and there is one stage: ``inline``.

    Example:
        >>> times = StageTimes(volume=0.4, step=0.02)
        >>> settings = LoaderSettings(num_workers=2, samples_per_volume=8, batch_size=4, queue_length=64)
        >>> {stage: round(rate) for stage, rate in capacities(times, settings).items() if rate < float("inf")}
        {'workers': 40, 'step': 200}
    """
    samples, batch = settings.samples_per_volume, settings.batch_size
    given = samples * settings.repeats
    busy = min(max(settings.num_workers, 1), settings.cpus)
    volume = times.of_volume(samples, busy)
    if settings.num_workers == 0:
        return {"inline": _rate(1, volume / given + (times.assembly + times.step) / batch)}
    cpus = settings.cpus if settings.worker_type == "process" else min(settings.cpus, times.threads_cpus)
    cpu = times.cpu_of_volume(samples, busy) / given + times.consumer_cpu / batch
    return {
        "workers": _rate(settings.num_workers * given, volume),
        "cpus": _rate(cpus, cpu),
        "assembly": _rate(batch, times.assembly),
        "step": demand(times, settings),
    }


def demand(times: StageTimes, settings: LoaderSettings) -> float:
    """Patches per second that the consumer would use if it never waited."""
    return _rate(settings.batch_size, times.step)


def deliverable(times: StageTimes, settings: LoaderSettings) -> float:
    """Patches per second: what the slowest stage can deliver, less the waiting at the start of each epoch."""
    rate = min(capacities(times, settings).values())
    if settings.persistent_workers or not settings.num_workers or rate == float("inf"):
        return rate
    patches = settings.volumes * settings.samples_per_volume * settings.repeats
    return patches / (patches / rate + times.epoch_start)


def expected_starved(times: StageTimes, settings: LoaderSettings) -> float:
    """Share of the consumer's time that goes by waiting, 0 to 1.

    Example:
        >>> times = StageTimes(volume=0.4, step=0.05)
        >>> expected_starved(times, LoaderSettings(num_workers=2, samples_per_volume=8, batch_size=4, queue_length=64))
        0.5
    """
    rate = deliverable(times, settings)
    return 1.0 - rate * times.step / settings.batch_size if rate < float("inf") else 0.0


def covers_longest(times: StageTimes, settings: LoaderSettings) -> bool:
    """Whether there are enough slots for others' patches while the slowest volume is prepared.

    A volume is begun (W + 1) · n + B patches before one of its own can be drawn. At the consumer's pace they must last
    for as long as its preparation takes.
    """
    ahead = (settings.num_workers + 1) * settings.samples_per_volume * settings.repeats + settings.batch_size
    return ahead >= times.longest * demand(times, settings)


def mixing(settings: LoaderSettings) -> float:
    """Volumes that a batch's patches are from, on average, where they are drawn at random from a full queue.

    That is V · (1 − C(L − n, B) / C(L, B)) for a queue of L patches, n of each of V = L / n volumes. Where the queue
    holds parts of more volumes, they are a little more.

    Example:
        >>> round(mixing(LoaderSettings(num_workers=2, samples_per_volume=8, batch_size=8, queue_length=64)), 1)
        5.4
    """
    each = max(round(settings.samples_per_volume), 1)
    length = max(settings.queue_length, each)
    batch = min(settings.batch_size, length)
    return length / each * (1 - comb(length - each, batch) / comb(length, batch))


def _rate(units: float, seconds: float) -> float:
    return units / seconds if seconds > 0 else float("inf")
