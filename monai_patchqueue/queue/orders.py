# SPDX-License-Identifier: Apache-2.0
"""In which order a sampler gives an epoch's volumes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from monai.data import DistributedSampler as MonaiDistributedSampler
from monai.data import DistributedWeightedRandomSampler
from torch.utils.data import RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from .epoch_sampler import EpochSampler
from .schedule import ORDER, seed_sequence
from .seeding import global_random_state

__all__ = ["VolumeOrders"]

_REPEATABLE = (
    SequentialSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    DistributedSampler,
    MonaiDistributedSampler,
    DistributedWeightedRandomSampler,
    EpochSampler,
    list,
    tuple,
    range,
)


class VolumeOrders:
    """Takes orders from a sampler without disturbing it, the caller's random state, or the next epoch.

    A sampler that uses the global generators sees them seeded from (seed, epoch), so its order depends on nothing else.

    Args:
        sampler: gives volume indices; ``set_epoch`` and ``epoch`` as in torch's ``DistributedSampler`` are understood.
        seed: the run's seed.
        num_volumes: size of the dataset.
    """

    def __init__(self, sampler: Iterable[int], seed: int, num_volumes: int) -> None:
        self._sampler = sampler
        self._seed = seed
        self._num_volumes = num_volumes
        self._last_epoch = self._sampler_epoch()
        self._moved = False
        self._before = self.generators()

    @property
    def repeatable(self) -> bool:
        """Whether the sampler's order depends on nothing but the seed, the epoch, and its own epoch number."""
        return type(self._sampler) in _REPEATABLE and not self.generators()

    @property
    def sampler_epoch(self) -> int | None:
        """The sampler's own epoch when an order was last taken, where it has one."""
        return self._last_epoch

    def take(self, epoch: int, sampler_epoch: int | None = None) -> tuple[int, ...]:
        """The order of ``epoch``, from the sampler as it is now, or as it would be in an epoch of its own.

        Raises:
            ValueError: a sampler that gives nothing, or an index that the dataset does not have.
        """
        self._before = self.generators()
        now = self._sampler_epoch()
        self._moved = now != self._last_epoch
        self._last_epoch = now
        sampler: Any = copy.copy(self._sampler)
        if sampler_epoch is not None and sampler_epoch != now:
            sampler.set_epoch(sampler_epoch)
            self._last_epoch = sampler_epoch
        return self._list(sampler, epoch)

    def guess(self, epoch: int) -> tuple[int, ...]:
        """The order that the epoch after the one last taken will probably have; changes nothing.

        Where somebody counts up the sampler's own epoch, they are expected to go on.
        """
        sampler: Any = copy.copy(self._sampler)
        if self._moved and self._last_epoch is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self._last_epoch + 1)
        with _kept_generators(sampler):
            return self._list(sampler, epoch)

    def generators(self, before: bool = False) -> dict[str, str]:
        """States of the ``torch.Generator`` objects that the sampler holds, as hexadecimal text by attribute.

        With ``before``, as they were when the last order was taken.
        """
        if before:
            return self._before
        attributes = getattr(self._sampler, "__dict__", {})
        found = {name: value for name, value in attributes.items() if isinstance(value, torch.Generator)}
        return {name: bytes(value.get_state().numpy()).hex() for name, value in found.items()}

    def restore(self, generators: Mapping[str, str]) -> None:
        """Set the sampler's generators to states that :meth:`generators` gave."""
        for name, text in generators.items():
            generator = getattr(self._sampler, name, None)
            if isinstance(generator, torch.Generator):
                generator.set_state(torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8))

    def _sampler_epoch(self) -> int | None:
        epoch = getattr(self._sampler, "epoch", None)
        return epoch if isinstance(epoch, int) else None

    def _list(self, sampler: Iterable[int], epoch: int) -> tuple[int, ...]:
        with global_random_state(seed_sequence(self._seed, ORDER, epoch)):
            order = tuple(int(index) for index in sampler)
        for index in order:
            if not 0 <= index < self._num_volumes:
                raise ValueError(
                    f"{type(sampler).__name__} gave index {index} in epoch {epoch}; expected volumes 0 to "
                    f"{self._num_volumes - 1}."
                )
        if not order:
            raise ValueError(f"{type(sampler).__name__} gave no volume in epoch {epoch}: there is nothing to train on.")
        return order


@contextmanager
def _kept_generators(sampler: object) -> Iterator[None]:
    """Restore the generators that a sampler holds: a shallow copy shares them with its original."""
    values = list(getattr(sampler, "__dict__", {}).values())
    of_torch = [(g, g.get_state()) for g in values if isinstance(g, torch.Generator)]
    of_numpy = [(g, g.bit_generator.state) for g in values if isinstance(g, np.random.Generator)]
    legacy = [(g, g.get_state()) for g in values if isinstance(g, np.random.RandomState)]
    try:
        yield
    finally:
        for torch_generator, state in of_torch:
            torch_generator.set_state(state)
        for numpy_generator, numpy_state in of_numpy:
            numpy_generator.bit_generator.state = numpy_state
        for random_state, legacy_state in legacy:
            random_state.set_state(legacy_state)
