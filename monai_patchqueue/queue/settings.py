# SPDX-License-Identifier: Apache-2.0
"""What of a loader and of the machine decides how many patches a second there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .slab import slots_needed

__all__ = ["LoaderSettings"]


@dataclass(frozen=True)
class LoaderSettings:
    """What of a loader's arguments, its pipeline and the machine decides how many patches a second it gives.

    Attributes:
        num_workers: volumes prepared at the same time; 0: in the consumer's thread.
        samples_per_volume: patches that a volume gives, on average.
        batch_size: patches per batch.
        queue_length: patches that draws are made from.
        worker_type: ``"process"`` or ``"thread"``.
        persistent_workers: whether workers go on between epochs.
        repeats: draws of each patch, on average.
        volumes: volumes per epoch.
        fixed_samples: the number of samples cannot be changed, as it differs between volumes or is a grid's.
        storable: names of the transforms that come before everything random, and could be applied once for all epochs.
        after_sampling: names of the transforms that are applied to each patch, after the one that cuts them.
        item_transform: as the loader has it.
        patch_transform: as the loader has it.
        suffix: how the volumes' files end, ``".gz"`` for instance; empty where they are not known.
        cpus: processors that this process may use.
        memory: bytes that the queue may take, those that it has included.
        patch_nbytes: bytes of a patch in its slot; 0 before that is known.

    Example:
        >>> settings = LoaderSettings(
        ...     num_workers=2, samples_per_volume=8, batch_size=4, queue_length=64, patch_nbytes=100
        ... )
        >>> settings.slab_bytes()
        9200
    """

    num_workers: int
    samples_per_volume: float
    batch_size: int
    queue_length: int
    worker_type: str = "process"
    persistent_workers: bool = True
    repeats: float = 1
    volumes: int = 1
    fixed_samples: bool = False
    storable: tuple[str, ...] = ()
    after_sampling: tuple[str, ...] = ()
    item_transform: Callable[[Any], Any] | None = None
    patch_transform: Callable[[Any], Any] | None = None
    suffix: str = ""
    cpus: float = 1.0
    memory: float = float("inf")
    patch_nbytes: int = 0

    def slab_bytes(self) -> int:
        """Memory of the slab with these settings."""
        most = max(round(self.samples_per_volume), 1)
        return slots_needed(self.queue_length, max(self.num_workers, 1), most, self.batch_size) * self.patch_nbytes
