# SPDX-License-Identifier: Apache-2.0
"""Why a consumer waits for its loader, in words, and what to change: from measured figures, by a stated model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..queue.settings import LoaderSettings
from ..queue.stats import QueueStats
from .advice import Advice, advise, in_one_sentence
from .candidates import WELL, Candidate
from .model import StageTimes, capacities, deliverable

__all__ = ["Diagnosis", "diagnose", "stage_times"]

# Fewer batches than that say little.
_FEW_BATCHES = 8
# A stage this much faster than the slowest is about as slow: whoever speeds up one of them meets the other.
_NEARLY = 1.25


@dataclass(frozen=True)
class Diagnosis:
    """Why batches are waited for.

    Attributes:
        text: a sentence or two.
        starved: share of the time that the consumer waited, the very first batch apart, 0 to 1.
        causes: the stages that limit the rate, the slowest first, named as in ``QueueStats.bottleneck``. Besides these:
            ``"cpus"`` where all processors are busy, ``"uneven"`` where only some volumes are too slow, ``"epochs"``
            where workers start anew in each. Empty where nobody waits.
        advice: alternatives, each of which would do by itself; empty where all is well, or where no setting helps.
    """

    text: str
    starved: float
    causes: Sequence[str] = ()
    advice: Sequence[Advice] = ()

    def __str__(self) -> str:
        return self.text


def diagnose(stats: QueueStats, settings: LoaderSettings) -> Diagnosis:
    """Say why the consumer waited for batches, and what would end that.

    The rate of a pipeline is that of its slowest stage (see ``docs/diagnosis.md``): of all workers together, of the
    processors, of the thread that assembles batches, or of the consumer. An advice is the weakest change of settings
    after which all stages are a fifth faster than the consumer; where there is none, the weakest after which waiting is
    less than half, and else one that gives a quarter more patches a second.

    Args:
        stats: ``loader.stats()``, after some batches.
        settings: ``loader.settings()``.

    Example:
        >>> from monai_patchqueue.queue.stats import QueueStats
        >>> stats = QueueStats(batches=100, volumes=50, seconds=10.0, wait_seconds=0.05,
        ...                    load_seconds=0.4, transform_seconds={"LoadImaged": 0.4}, step_seconds=0.05)
        >>> settings = LoaderSettings(num_workers=2, samples_per_volume=8, batch_size=4, queue_length=128,
        ...                           volumes=50, storable=("LoadImaged",), suffix=".gz", cpus=8)
        >>> print(diagnose(stats, settings))
        starved 50 % of the time: workers spend 100 % in LoadImaged (gzip). 3 more workers, samples_per_volume 8 → 24
        with queue_length 128 → 384, or the chunked store (ChunkedDataset) would end it.
    """
    times = stage_times(stats, settings)
    starved = _starved(stats)
    if stats.batches < _FEW_BATCHES or not stats.volumes:
        return Diagnosis(f"too early to tell: {stats.batches} batches of {stats.volumes} volumes so far.", starved)
    if starved < WELL:
        return Diagnosis(f"all is well: {_percent(starved)} of the time was spent waiting for batches.", starved)
    start = Candidate(times, settings)
    causes = _causes(stats, start)
    text = f"starved {_percent(starved)} of the time: {' and '.join(causes.values())}."
    storable = sum(stats.transform_seconds.get(name, 0.0) for name in settings.storable)
    advice, promise = advise(start, starved, storable, uneven="uneven" in causes)
    text += f" {in_one_sentence(advice, promise)}" if advice else " No setting of the loader would help."
    return Diagnosis(text, starved, tuple(causes), advice)


def stage_times(stats: QueueStats, settings: LoaderSettings) -> StageTimes:
    """The times of a pipeline's stages, from figures that were measured while it ran.

    What grows with the number of patches is writing, sampling and what comes after it; the rest of a volume's time does
    not. (Sampling does so in part only, so that more samples cost no more than this says.)
    """
    total = stats.load_seconds + stats.sample_seconds + stats.write_seconds
    after = sum(stats.transform_seconds.get(name, 0.0) for name in settings.after_sampling)
    by_patch = min(stats.write_seconds + stats.sample_seconds + after, total)
    computing = min(stats.cpu_seconds / total, 1.0) if total else 0.0
    samples = settings.samples_per_volume
    assembly = stats.assemble_seconds + stats.item_transform_seconds + stats.batch_transform_seconds
    return StageTimes(
        volume=total - by_patch,
        patch=by_patch / samples,
        volume_cpu=computing * (total - by_patch),
        patch_cpu=computing * by_patch / samples,
        assembly=assembly,
        item_transform=stats.item_transform_seconds,
        step=stats.step_seconds,
        consumer_cpu=stats.consumer_cpu_seconds,
        longest=max(stats.max_volume_seconds, total),
        epoch_start=stats.epoch_wait_seconds,
        threads_cpus=max(1.0, stats.volumes_per_second * stats.cpu_seconds),
    )


def _starved(stats: QueueStats) -> float:
    """Without the wait for the very first batch, which no setting spares."""
    rest = stats.seconds - stats.first_wait_seconds
    waited = stats.wait_seconds * stats.batches - stats.first_wait_seconds
    return min(max(waited / rest, 0.0), 1.0) if rest > 0 else 0.0


def _causes(stats: QueueStats, start: Candidate) -> dict[str, str]:
    """What limits the rate, the slowest first, with words for each."""
    times, settings = start.times, start.settings
    rates = capacities(times, settings)
    slowest = min(rates.values())
    wanted = rates.pop("step", float("inf"))
    limiting = sorted((rate, stage) for stage, rate in rates.items() if rate < min(_NEARLY * slowest, wanted))
    stages = [stage for _, stage in limiting]
    if "cpus" in stages and "workers" in stages:  # they have no processors to work with: one cause, not two
        stages.remove("workers")
    causes = dict(_cause(stage, stats, settings) for stage in stages)
    if deliverable(times, settings) < 0.9 * slowest:
        causes["epochs"] = "workers start anew in each epoch (persistent_workers=False)"
    if not causes:
        mean = stats.load_seconds + stats.sample_seconds + stats.write_seconds
        causes["uneven"] = (
            f"every stage is fast enough on average, but volumes take unequal times, {mean:.2g} s on average and up to "
            f"{times.longest:.2g} s"
        )
    return causes


def _cause(stage: str, stats: QueueStats, settings: LoaderSettings) -> tuple[str, str]:
    if stage == "assembly":
        parts = {
            "assembly": stats.assemble_seconds,
            "item_transform": stats.item_transform_seconds,
            "batch_transform": stats.batch_transform_seconds,
        }
        name, spent = _most(parts, {"assembly": "collating"})
        return name, f"batches are assembled by one thread, which spends {spent}"
    compressed = {name: f"{name} (gzip)" for name in stats.transform_seconds if name.startswith("Load")}
    words = {"write": "writing patches", **(compressed if settings.suffix == ".gz" else {})}
    name, spent = _most({**stats.transform_seconds, "write": stats.write_seconds}, words)
    if stage == "inline":
        total = stats.load_seconds + stats.sample_seconds + stats.write_seconds
        return f"inline:{name}", f"nothing is prepared ahead (num_workers=0), and volumes take {total:.2g} s, {spent}"
    if stage == "cpus" and settings.worker_type == "thread":
        return "cpus", f"threads share one interpreter, and spend {spent}"
    if stage == "cpus":
        return "cpus", f"the {settings.cpus:g} processors are busy, and workers spend {spent}"
    return f"workers:{name}", f"workers spend {spent}"


def _most(seconds: Mapping[str, float], words: Mapping[str, str]) -> tuple[str, str]:
    """What takes longest, and the shares of the time that it and whatever takes nearly as long have."""
    total = sum(seconds.values()) or 1.0
    ordered = sorted(seconds, key=seconds.__getitem__, reverse=True)
    named = [name for name in ordered[:2] if seconds[name] * 2 >= seconds[ordered[0]]]
    return ordered[0], " and ".join(f"{_percent(seconds[name] / total)} in {words.get(name, name)}" for name in named)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
