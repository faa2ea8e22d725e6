# SPDX-License-Identifier: Apache-2.0
"""A rank's share of an epoch's volumes, as long as it is told to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data.distributed import DistributedSampler

from .ranks import ranks

__all__ = ["EpochSampler"]

_BLOCK = 1024  # draws of each rank at a time


class EpochSampler(DistributedSampler[int]):
    """Volumes in order, shuffled, or drawn with replacement in proportion to weights; epochs are as long as told.

    All ranks know the order that they share; each takes every ``num_replicas``-th volume of it. So each draw of each
    rank follows the weights of all volumes. MONAI's ``DistributedWeightedRandomSampler`` draws within a rank's share
    of the volumes, where the weights mean something else on each rank and in each epoch.

    In a single process the order comes from ``generator``, by default torch's global one, and is new in each epoch; in
    a distributed run it comes from ``seed`` and the epoch that ``set_epoch`` names, as in every ``DistributedSampler``.

    Args:
        num_volumes: size of the dataset.
        weights: of each volume, if volumes are drawn with replacement.
        counts: patches that each volume gives. Default: one.
        length: patches that this rank gets in an epoch. Drawing with replacement goes on until it has them; otherwise
            what a rank's share has more or less is up to the queue. Default: this rank's share, rounded up.
        shuffle: whether the order is random where there are no weights.
        fixed: the same order in every epoch, from ``seed`` alone.
        num_replicas: number of ranks. Default: as in this process's group.
        rank: this one. Default: as in this process's group.
        seed: the same on all ranks.
        generator: for a single process.

    Example:
        >>> ranks = [EpochSampler(8, num_replicas=2, rank=rank) for rank in range(2)]
        >>> first, second = (list(sampler) for sampler in ranks)
        >>> sorted(first + second)
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(
        self,
        num_volumes: int,
        *,
        weights: Sequence[float] | None = None,
        counts: Sequence[int] | None = None,
        length: int | None = None,
        shuffle: bool = True,
        fixed: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        own_rank, world_size = ranks()
        super().__init__(
            range(num_volumes),  # type: ignore[arg-type]
            num_replicas=world_size if num_replicas is None else num_replicas,
            rank=own_rank if rank is None else rank,
            shuffle=shuffle,
            seed=seed,
        )
        self.num_volumes = num_volumes
        self.weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        self.counts = [1] * num_volumes if counts is None else list(counts)
        self.num_patches = -(-sum(self.counts) // self.num_replicas) if length is None else length
        if counts is None:
            self.num_samples = self.num_patches
            self.total_size = self.num_samples * self.num_replicas
        self.fixed = fixed
        self.generator = generator

    def __iter__(self) -> Iterator[int]:
        return self._in_turn() if self.weights is None else self._drawn(self.weights)

    def _in_turn(self) -> Iterator[int]:
        volumes = self.num_volumes
        order = torch.randperm(volumes, generator=self._generator()) if self.shuffle else torch.arange(volumes)
        order = order.repeat(-(-self.total_size // volumes))[: self.total_size]
        return iter(order[self.rank :: self.num_replicas].tolist())

    def _drawn(self, weights: torch.Tensor) -> Iterator[int]:
        # Stopping at a number of patches, instead of volumes, leaves all groups their share (Wald's identity).
        generator = self._generator()
        missing = self.num_patches
        while missing > 0:
            block = torch.multinomial(weights, _BLOCK * self.num_replicas, replacement=True, generator=generator)
            for volume in block[self.rank :: self.num_replicas].tolist():
                if missing > 0:
                    missing -= self.counts[volume]
                    yield volume

    def _generator(self) -> torch.Generator | None:
        if self.fixed:
            return torch.Generator().manual_seed(self.seed)
        if self.num_replicas > 1:
            return torch.Generator().manual_seed(self.seed + self.epoch)
        return self.generator
