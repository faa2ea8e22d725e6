# SPDX-License-Identifier: Apache-2.0
"""The loaders that a data module makes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from monai.data import DataLoader as MonaiDataLoader
from monai.data import DistributedSampler
from torch.utils.data import DataLoader, Dataset

from ..queue.epoch_sampler import EpochSampler
from ..queue.ranks import ranks
from .patch_queue_loader import PatchQueueLoader
from .volumes import SamplesPerVolume

__all__ = ["check_loader_arguments", "evaluation_loader", "training_loader"]

_OWN = {
    "dataset": "splits decides it",
    "num_workers": "set parallel instead",
    "batch_size": "it is an argument of the data module's own",
    "shuffle": "training is shuffled, all else is not",
    "sampler": "the data module has its own, which balances and splits over ranks",
    "batch_sampler": "the data module decides what is in a batch",
    "generator": "set seed instead",
    "drop_last": "set drop_incomplete_batch instead",
    "batch_unit": "batch_size counts patches here",
    "seed": "it is an argument of the data module's own",
    "samples_per_volume": "it is an argument of the data module's own",
}


def check_loader_arguments(name: str, arguments: Mapping[str, Any], loader: type[DataLoader[Any]]) -> None:
    """Refuse arguments that a loader does not take, or that the data module gives it.

    Raises:
        ValueError: with the argument's name, and why it is refused.
    """
    known = [argument for argument in inspect.signature(loader.__init__).parameters if argument not in _OWN]
    for argument in arguments:
        if argument in _OWN:
            raise ValueError(f"{name} has {argument!r}: {_OWN[argument]}.")
        if argument not in known:
            similar = get_close_matches(argument, known, n=1)
            advice = f" Did you mean {similar[0]!r}?" if similar else ""
            raise ValueError(f"{name} has {argument!r}, which {loader.__name__} does not take.{advice}")


def training_loader(
    dataset: Dataset[Any],
    *,
    length: int,
    counts: Sequence[int] | None,
    weights: Sequence[float] | None,
    shuffle: bool,
    seed: int | None,
    batch_size: int,
    num_workers: int,
    samples_per_volume: SamplesPerVolume | None,
    arguments: Mapping[str, Any],
) -> DataLoader[Any]:
    """A loader of a rank's share of the training volumes.

    Args:
        dataset: the volumes of all ranks.
        length: patches, or volumes, in an epoch of this rank.
        counts: patches that each volume gives; these go through the queue. ``None``: a plain loader of volumes.
        weights: for drawing volumes with replacement.
        shuffle: whether the order is random.
        seed: of orders and, in the queue, of patches.
        batch_size: patches, or volumes, in a batch.
        num_workers: volumes prepared at the same time.
        samples_per_volume: for the queue.
        arguments: more, for the loader.
    """
    generator = None if seed is None or counts is not None else torch.Generator().manual_seed(seed)
    sampler = EpochSampler(
        len(dataset),  # type: ignore[arg-type]
        weights=weights,
        counts=counts,
        length=length,
        shuffle=shuffle,
        seed=seed or 0,
        generator=generator,
    )
    arguments = {**arguments, "batch_size": batch_size, "sampler": sampler, "num_workers": num_workers}
    if counts is None:
        plain: DataLoader[Any] = MonaiDataLoader(dataset, **arguments, generator=generator)
        return plain
    if not shuffle:
        arguments["shuffle_patches"] = False
    return PatchQueueLoader(dataset, **arguments, batch_unit="patch", samples_per_volume=samples_per_volume, seed=seed)


def evaluation_loader(
    dataset: Dataset[Any],
    *,
    weights: Sequence[float] | None,
    seed: int | None,
    batch_size: int,
    num_workers: int,
    arguments: Mapping[str, Any],
) -> DataLoader[Any]:
    """A plain loader of a rank's share of volumes: each once and in order, or drawn by weights, always the same.

    Args:
        dataset: the volumes of all ranks.
        weights: for drawing volumes with replacement.
        seed: of these draws.
        batch_size: volumes in a batch.
        num_workers: of the loader.
        arguments: more, for the loader.
    """
    volumes = len(dataset)  # type: ignore[arg-type]
    _, world_size = ranks()
    sampler: Any = None
    if weights is not None:
        sampler = EpochSampler(volumes, weights=weights, fixed=True, seed=seed or 0)
    elif world_size > 1:
        sampler = DistributedSampler(dataset, even_divisible=volumes < world_size, shuffle=False)
    loader: DataLoader[Any] = MonaiDataLoader(
        dataset, sampler=sampler, batch_size=batch_size, num_workers=num_workers, **arguments
    )
    return loader
