# SPDX-License-Identifier: Apache-2.0
"""What to change so that nobody waits, in words and as arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..queue.settings import LoaderSettings
from .candidates import Candidate, best, candidates, ends_waiting, with_store

__all__ = ["Advice", "advise", "in_one_sentence"]

# The store reads patches instead of preparing volumes, which takes less than this share of the time.
_STORE_TAKES = 0.1
_ALTERNATIVES = 3


@dataclass(frozen=True)
class Advice:
    """Something to change.

    Attributes:
        text: the change in words.
        changes: arguments of ``PatchQueueLoader`` with the values to give them. ``samples_per_volume`` is as a rule
            the ``num_samples`` of the transform that cuts patches. Empty for a change of the pipeline.
        starved: share of the time that the consumer would wait then, as the model has it, 0 to 1.
        patches_per_second: what the loader would give then, as the model has it.
    """

    text: str
    changes: Mapping[str, Any]
    starved: float
    patches_per_second: float


def advise(
    start: Candidate, starved: float, storable: float = 0.0, uneven: bool = False
) -> tuple[tuple[Advice, ...], str]:
    """Changes that would keep a consumer from waiting.

    Args:
        start: the loader as it is.
        starved: share of the time that the consumer waits now.
        storable: seconds per volume that go by in what could be done once for all epochs.
        uneven: it waits only for volumes that are slower than others.

    Returns:
        Alternatives that keep the same promise, and that promise.
    """
    stored = with_store(start, (1 - _STORE_TAKES) * storable)

    def ends(candidate: Candidate) -> bool:
        return ends_waiting(candidate, uneven)

    def halves(candidate: Candidate) -> bool:
        return not uneven and candidate.starved <= 0.45 * starved

    promises: Sequence[tuple[Callable[[Candidate], bool], str]] = ((ends, "end it"), (halves, "more than halve it"))
    for enough, promise in promises:
        found = [_to_advice(start.settings, each) for each in candidates(start, enough)][:_ALTERNATIVES]
        if storable and enough(stored):
            found.append(Advice("the chunked store (ChunkedDataset)", {}, stored.starved, stored.patches_per_second))
        if found:
            return tuple(found), promise
    helping = None if uneven else best(start)
    if helping is None:
        return (), ""
    rate = f"give {helping.patches_per_second / start.patches_per_second:.1f} times as many patches a second"
    return (_to_advice(start.settings, helping),), rate


def _to_advice(before: LoaderSettings, candidate: Candidate) -> Advice:
    return Advice(
        _in_words(before, candidate.changes), dict(candidate.changes), candidate.starved, candidate.patches_per_second
    )


def _in_words(before: LoaderSettings, changes: Mapping[str, Any]) -> str:
    words = []
    if "num_workers" in changes:
        more = changes["num_workers"] - before.num_workers
        words.append(f"{more} {'more ' if before.num_workers else ''}worker{'s' if more > 1 else ''}")
    if "samples_per_volume" in changes:
        words.append(f"samples_per_volume {before.samples_per_volume:g} → {changes['samples_per_volume']}")
        if changes["queue_length"] != before.queue_length:
            words[-1] += f" with queue_length {before.queue_length} → {changes['queue_length']}"
    if "patch_transform" in changes:
        words.append("item_transform as patch_transform (in the workers)")
    if "worker_type" in changes:
        words.append("worker_type='process' instead of threads")
    if "persistent_workers" in changes:
        words.append("persistent_workers=True")
    return " and ".join(words)


def in_one_sentence(advice: Sequence[Advice], promise: str) -> str:
    """Alternatives, and what each would do."""
    *others, last = [each.text for each in advice]
    comma = "," if len(others) > 1 else ""
    return f"{', '.join(others)}{comma} or {last} would {promise}." if others else f"{last} would {promise}."
