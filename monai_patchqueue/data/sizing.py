# SPDX-License-Identifier: Apache-2.0
"""How long an epoch and the queue are."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import SubsetRandomSampler
from torch.utils.data.distributed import DistributedSampler

from ..queue.epoch_sampler import EpochSampler
from ..queue.memory import available_memory, format_bytes, parse_budget, ranks_on_this_host
from ..queue.producers.executors import parallelism
from ..queue.slab import slots_needed
from .options import QueueOptions

__all__ = ["Sizing", "epoch_patches"]


def epoch_patches(sampler: Iterable[int], counts: np.ndarray[Any, np.dtype[np.int64]]) -> int:
    """Patches in an epoch: the same in every epoch, and on every rank.

    What an :class:`EpochSampler` says; Σ counts / replicas, rounded up, under another ``DistributedSampler``; the sum
    over the volumes that it gives where a sampler says which these are; else mean count × ``len(sampler)``, rounded up.

    Raises:
        TypeError: a sampler without a length.

    Example:
        >>> epoch_patches([0, 2], np.array([4, 4, 1]))
        5
    """
    total = int(counts.sum())
    if isinstance(sampler, DistributedSampler):
        if sampler.num_replicas > len(counts):
            raise ValueError(
                f"{len(counts)} volumes for {sampler.num_replicas} ranks: each rank needs a volume of its own. "
                "Use fewer "
                "ranks or more volumes."
            )
        if isinstance(sampler, EpochSampler):
            return sampler.num_patches
        if len(sampler) == sampler.num_samples:  # else it draws a number of its own, as a weighted one may
            return -(-total // sampler.num_replicas)
    chosen = sampler.indices if isinstance(sampler, SubsetRandomSampler) else sampler
    if isinstance(chosen, (list, tuple, range)):
        return int(counts[list(chosen)].sum())
    if not isinstance(sampler, Sized):
        raise TypeError(
            f"sampler {type(sampler).__name__} has no len(): the loader could not tell how long an epoch is."
        )
    if len(sampler) == 0:
        raise ValueError(
            f"sampler {type(sampler).__name__} has len() 0: it gives no volume. Each rank needs a volume of its own; "
            f"there are {len(counts)} for all of them."
        )
    return -(-total * len(sampler) // len(counts))


@dataclass(frozen=True)
class Sizing:
    """Lengths that follow from a queue's arguments.

    Args:
        patches: patches in an epoch.
        repeats: draws of each.
        batch_size: patches in a batch.
        drop_last: leave out a last, smaller batch.
        max_count: the largest number of patches that a volume gives.
        workers: volumes that are prepared at the same time.
        length: the queue's length, where it is given.
        budget: the memory that it may take, where that is given.
        item_nbytes: bytes of a patch, where they are given rather than measured.
    """

    patches: int
    repeats: int
    batch_size: int
    drop_last: bool
    max_count: int
    workers: int
    length: int | None
    budget: float | int | str | None
    item_nbytes: int | None = None

    @staticmethod
    def of(options: QueueOptions) -> Sizing:
        """The lengths for these arguments.

        Raises:
            ValueError: an epoch without a batch.
        """
        sizing = Sizing(
            patches=epoch_patches(options.sampler, options.counts),
            repeats=options.repeats,
            batch_size=options.batch_size,
            drop_last=options.drop_last,
            max_count=int(options.counts.max()),
            workers=parallelism(options.executor) if options.executor else max(options.num_workers, 1),
            length=options.queue_length,
            budget=options.ram_budget,
        )
        if not sizing.num_batches:
            raise ValueError(
                f"an epoch has {sizing.draws} patches, fewer than batch_size={options.batch_size}: with "
                "drop_last=True no "
                "batch would be left."
            )
        return sizing

    @property
    def draws(self) -> int:
        """Draws in an epoch."""
        return self.patches * self.repeats

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(self.draws, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def wished_length(self) -> int:
        """The queue's length in patches, if memory allows. A window never holds more than an epoch's patches."""
        wished = max(16 * self.max_count, 8 * self.batch_size) if self.length is None else self.length
        return max(1, min(wished, self.patches))

    def slots(self, length: int) -> int:
        """Slots for a queue of ``length`` patches."""
        return slots_needed(length, self.workers, self.max_count, self.batch_size)

    def queue_length(self, patch_nbytes: int) -> int:
        """The queue's length in patches, once the size of a patch is known.

        Raises:
            ValueError: where it does not fit into memory; the message has the arithmetic.
        """
        available = available_memory() // ranks_on_this_host()
        size = max(self.item_nbytes or patch_nbytes, 1)
        if self.length is not None:
            if self.slots(self.wished_length) * size > available:
                raise ValueError(
                    f"queue_length={self.length} does not fit into memory: "
                    f"{self._arithmetic(self.wished_length, size)} "
                    f"of {format_bytes(available)} available. Lower queue_length, samples_per_volume or "
                    "num_workers, or "
                    "pass ram_budget."
                )
            return self.wished_length
        if self.budget is None:
            return max(1, min(self.wished_length, available // 4 // size))
        # A budget is the window's alone: a number of bytes gives the same batches with any number of workers.
        budget = parse_budget(self.budget)
        if isinstance(budget, float):
            allowed = min(int(budget * available), available - self.slots(0) * size)
        else:
            allowed = budget // ranks_on_this_host()
        length = min(allowed // size, self.patches)
        if length < 1 or max(allowed, self.slots(length) * size) > available:
            raise ValueError(
                f"ram_budget={self.budget!r} allows a queue of {format_bytes(allowed)} in this process: "
                f"{self._arithmetic(max(length, 1), size)} of {format_bytes(available)} available. Change "
                "ram_budget, or "
                "lower samples_per_volume or num_workers."
            )
        return length

    def _arithmetic(self, length: int, size: int) -> str:
        slots = self.slots(length)
        return (
            f"({length} slots for the queue + {slots - length} for volumes in preparation) × {format_bytes(size)} "
            "a patch = "
            f"{format_bytes(slots * size)}"
        )
