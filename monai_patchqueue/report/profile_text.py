# SPDX-License-Identifier: Apache-2.0
"""A profile as text: tables of times and of predictions, and what to set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..queue.memory import format_bytes
from .advice import Advice, advise, in_one_sentence
from .candidates import WELL, Candidate, ends_waiting
from .model import capacities, deliverable, expected_starved, mixing
from .profiler import PipelineProfile

__all__ = ["advice_of", "profile_as_text"]

_BAR = 24
_STAGES = {
    "inline": "everything is done in turn",
    "workers": "the workers",
    "cpus": "the processors",
    "assembly": "assembling batches",
    "step": "the step",
}


def advice_of(profile: PipelineProfile) -> tuple[Sequence[Advice], str]:
    """What to set, and what that would do.

    It is so that the step never waits; or, where no step is known, for as many patches a second as there can be.
    """
    start = Candidate(profile.times, profile.settings)
    if not profile.times.step:
        return advise(start, 1.0, _storable(profile))
    if ends_waiting(start) or start.starved < WELL / 2:
        return (), ""
    return advise(start, start.starved, _storable(profile))


def _storable(profile: PipelineProfile) -> float:
    return sum(profile.stats.transform_seconds.get(name, 0.0) for name in profile.settings.storable)


def profile_as_text(profile: PipelineProfile, advice: Sequence[Advice], promise: str) -> str:
    """All that a profile says."""
    parts = [_times(profile), _predictions(profile), _queues(profile), _verdict(profile, advice, promise)]
    if profile.others > 0.25 * profile.settings.cpus:
        parts.append(
            f"Other programs kept {profile.others:.1f} of {profile.settings.cpus:g} processors busy meanwhile: the "
            "figures hold for that, and not for a machine of your own."
        )
    return "\n\n".join(parts)


def _times(profile: PipelineProfile) -> str:
    stats, settings = profile.stats, profile.settings
    total = stats.load_seconds + stats.sample_seconds + stats.write_seconds
    stages = {**stats.transform_seconds, "writing into the queue": stats.write_seconds}
    rows = [(name, seconds, seconds / total) for name, seconds in stages.items() if seconds >= 1e-5]
    waiting = 1 - min(stats.cpu_seconds / total, 1.0)
    head = (
        f"A volume ({settings.samples_per_volume:g} patches) takes a worker {_ms(total)}, {100 * waiting:.0f} % of it "
        "waiting (for storage as a rule):"
    )
    parts = {
        "collating": stats.assemble_seconds,
        "item_transform": stats.item_transform_seconds,
        "batch_transform": stats.batch_transform_seconds,
    }
    assembly = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in parts.items() if seconds)
    return "\n".join([head, *_bars(rows), f"A batch of {settings.batch_size} patches takes: {assembly}."])


def _bars(rows: Sequence[tuple[str, float, float]]) -> list[str]:
    width = max(len(name) for name, _, _ in rows)
    most = max(share for _, _, share in rows)
    return [
        f"  {name:<{width}} {1000 * seconds:9.1f} ms {100 * share:4.0f} %  {'█' * round(_BAR * share / most)}".rstrip()
        for name, seconds, share in rows
    ]


def _predictions(profile: PipelineProfile) -> str:
    settings, times = profile.settings, profile.times
    samples = [settings.samples_per_volume]
    if not settings.fixed_samples:
        samples = [int(settings.samples_per_volume * factor) for factor in (0.5, 1, 2, 4)]
        samples = sorted({count for count in samples if count})
    most = max(2 * round(settings.cpus), 2 * settings.num_workers, 4)
    workers = sorted({0, 1, settings.num_workers, *(2**power for power in range(1, 10) if 2**power <= most)})
    workers = [count for count in workers if count <= max(settings.volumes, settings.num_workers)]
    head = "  workers" + "".join(f"{f'{count:g} samples':>14}" for count in samples) + "   limit with "
    lines = [head + f"{settings.samples_per_volume:g} samples"]
    for count in workers:
        cells = []
        for number in samples:
            changed = replace(settings, num_workers=count, samples_per_volume=number)
            cell = f"{deliverable(times, changed):.0f}"
            if times.step:
                cell += f" ({100 * expected_starved(times, changed):.0f} %)"
            same = count == settings.num_workers and number == settings.samples_per_volume
            cells.append(f"{'*' if same else ''}{cell}".rjust(14))
        rates = capacities(times, replace(settings, num_workers=count))
        lines.append(f"{count:9d}" + "".join(cells) + f"   {_STAGES[min(rates, key=rates.__getitem__)]}")
    step = f" to a step of {_ms(times.step)} (in brackets: how much of the time it waits)" if times.step else ""
    measured = ", ".join(
        f"{run.patches_per_second:.0f} with {_count(run.settings.num_workers, 'worker')} and "
        f"{run.settings.samples_per_volume:g} samples"
        for run in profile.runs
    )
    lines.append(f"Measured, without a step: {measured}.")
    if profile.own_patches_per_second is not None:
        lines.append(
            f"The bundle's own loader, with {_count(settings.num_workers, 'worker')}: "
            f"{profile.own_patches_per_second:.0f} patches per second, measured."
        )
    return "\n".join([f"Patches per second{step}, predicted (*: as it is):", *lines])


def _queues(profile: PipelineProfile) -> str:
    settings = profile.settings
    lengths = sorted({max(settings.queue_length * factor // 2, settings.batch_size) for factor in (1, 2, 4, 8)})
    lines = ["  queue_length     memory   volumes in a batch"]
    for length in lengths:
        changed = replace(settings, queue_length=length)
        mark = "*" if length == settings.queue_length else ""
        lines.append(f"{mark + str(length):>14}{format_bytes(changed.slab_bytes()):>11}{mixing(changed):>21.1f}")
    return "\n".join([f"The queue's length, for batches of {settings.batch_size} patches (*: as it is):", *lines])


def _verdict(profile: PipelineProfile, advice: Sequence[Advice], promise: str) -> str:
    start = Candidate(profile.times, profile.settings)
    if advice:
        goal = f"The step would wait {100 * start.starved:.0f} % of the time. " if profile.times.step else ""
        return f"{goal}{_capital(in_one_sentence(advice, promise))}"
    if not profile.times.step:
        return "As it is, the loader gives as many patches a second as any setting would."
    if start.starved < WELL:
        return f"All is well: a step of {_ms(profile.times.step)} never waits."
    return f"The step would wait {100 * start.starved:.0f} % of the time, and no setting of the loader would help."


def _capital(text: str) -> str:
    return text if "_" in text.split()[0] else text[0].upper() + text[1:]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"
