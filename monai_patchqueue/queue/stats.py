# SPDX-License-Identifier: Apache-2.0
"""Figures of a queue, as users read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .views import as_html, as_line

__all__ = ["ByVolume", "QueueStats"]


class ByVolume(Mapping[int, Any]):
    """A figure of each volume that has one, by the volume's index in the dataset.

    Args:
        values: an array with a value for each volume, which is not to change any more, or what makes it when somebody
            looks: statistics are taken each step, and hardly ever looked at volume by volume.

    Example:
        >>> ByVolume(np.array([0, 3, 1]))
        {1: 3, 2: 1}
    """

    def __init__(self, values: np.ndarray[Any, Any] | Callable[[], np.ndarray[Any, Any]]) -> None:
        self._values = values

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """A value for each volume; it cannot be written to."""
        if callable(self._values):
            self._values = self._values()
        array: np.ndarray[Any, Any] = self._values.view()
        array.flags.writeable = False
        return array

    @classmethod
    def of(cls, figures: Mapping[int, Any]) -> ByVolume:
        """The figures of a mapping from volumes."""
        if isinstance(figures, ByVolume):
            return figures
        array = np.zeros(max(figures, default=-1) + 1, np.result_type(*figures.values()) if figures else np.int64)
        array[list(figures)] = list(figures.values())
        return cls(array)

    def __getitem__(self, volume: int) -> Any:
        array = self.array
        if not 0 <= volume < len(array) or not array[volume]:
            raise KeyError(volume)
        return array[volume].item()

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(self.array).tolist())

    def __len__(self) -> int:
        return int(np.count_nonzero(self.array))

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> Any:
        return ByVolume, (self.array,)


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
        volumes_per_batch: mean number of volumes that meet in a batch.
        reuse: draws of a patch on average, before others take its place.
        age: mean number of batches that what was drawn had been in a :class:`RandomQueueDataset`; 0 for other queues.
        seconds: that time: epochs under way.
        wait_seconds: mean time that the consumer waited for a batch.
        last_wait_seconds: time that it waited for the last batch.
        max_wait_seconds: the longest time that it waited for a batch.
        first_wait_seconds: time that it waited for the very first batch, while workers started.
        epoch_wait_seconds: mean time that it waited for the first batch of each later epoch.
        starved: share of that time which the consumer spent waiting for batches, 0 to 1.
        load_seconds: mean time per volume, in the workers, of loading and transforms but sampling.
        sample_seconds: mean time per volume of multi-sample transforms: choosing centers and cropping.
        write_seconds: mean time per volume of writing patches into their slots.
        cpu_seconds: mean processor time per volume within these three; the rest is waiting, for storage as a rule.
        max_volume_seconds: time of these three for the slowest volume.
        assemble_seconds: mean time per batch of gathering its patches and collating them.
        item_transform_seconds: mean time per batch of ``item_transform``.
        batch_transform_seconds: mean time per batch of ``batch_transform``.
        step_seconds: mean time from a batch's delivery to the request for the next: the consumer's own work.
        consumer_cpu_seconds: mean processor time per batch of the consumer's process, workers apart: assembling and the
            consumer's own work, by all threads.
        worker_busy: share of their time that the workers spent preparing volumes, 0 to 1.
        assembly_busy: share of the time in which batches were assembled, 0 to 1.
        num_workers: volumes prepared at the same time; 0: the consumer prepares them itself.
        slab_bytes: size of the slab.
        failures: volumes that could not be prepared, and were replaced.
        lost_draws: draws that epochs were longer than ``len(loader)`` says, on this rank, and that were left out.
        extra_draws: draws that epochs were shorter, and that were made again.
        volumes_seen: volumes that patches were handed out of.
        volume_patches_min: patches handed out of the volume that gave fewest, of those that gave any.
        volume_patches_max: patches handed out of the volume that gave most.
        volume_counts: patches handed out of each volume, by its index in the dataset.
        volume_expected: patches that these would be if each volume were drawn from at its epoch's pace, as often as
            the sampler gave it. Differs from the counts in the middle of an epoch, after failures, and where draws
            were left out or made again; empty where no order is known.
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
    volumes_per_batch: float = 0.0
    reuse: float = 0.0
    age: float = 0.0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    last_wait_seconds: float = 0.0
    max_wait_seconds: float = 0.0
    first_wait_seconds: float = 0.0
    epoch_wait_seconds: float = 0.0
    starved: float = 0.0
    load_seconds: float = 0.0
    sample_seconds: float = 0.0
    write_seconds: float = 0.0
    cpu_seconds: float = 0.0
    max_volume_seconds: float = 0.0
    assemble_seconds: float = 0.0
    item_transform_seconds: float = 0.0
    batch_transform_seconds: float = 0.0
    step_seconds: float = 0.0
    consumer_cpu_seconds: float = 0.0
    worker_busy: float = 0.0
    assembly_busy: float = 0.0
    num_workers: int = 0
    slab_bytes: int = 0
    failures: int = 0
    lost_draws: int = 0
    extra_draws: int = 0
    volumes_seen: int = 0
    volume_patches_min: int = 0
    volume_patches_max: int = 0
    volume_counts: Mapping[int, int] = field(default_factory=dict)
    volume_expected: Mapping[int, float] = field(default_factory=dict)
    failure_counts: Mapping[int, int] = field(default_factory=dict)
    transform_seconds: Mapping[str, float] = field(default_factory=dict)
    bottleneck: str = "unknown"

    def scalars(self) -> dict[str, float]:
        """The figures that are numbers, as floats by name.

        Example:
            >>> QueueStats(fill=0.5).scalars()["fill"]
            0.5
        """
        values = vars(self)
        return {name: float(values[name]) for name in _SCALARS}

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch}: {self.patches} patches of {self.volumes} volumes, {self.patches_per_second:.1f} "
            f"patches/s, queue {self.fill:.0%} full, starved {self.starved:.0%} of the time, "
            f"bottleneck {self.bottleneck}"
        )

    def line(self) -> str:
        """A short line for a terminal, as a progress bar shows it.

        Example:
            >>> QueueStats(fill=0.75, starved=0.02, bottleneck="consumer").line()
            'queue |██████  | 75%, starved 2%, consumer'
        """
        return as_line(self)

    def _repr_html_(self) -> str:
        return as_html(self)


_SCALARS = tuple(f.name for f in fields(QueueStats) if isinstance(f.default, (int, float)))
