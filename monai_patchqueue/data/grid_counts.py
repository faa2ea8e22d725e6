# SPDX-License-Identifier: Apache-2.0
"""How many patches the grids of volumes have: told by headers where possible, else found out by loading."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..queue.errors import Failure
from ..transforms import GridPatchSamplesd
from .grid_pieces import GridPiece, whole_volume
from .volumes import SamplesPerVolume, count_patches, grid_patch_count, transforms_of, volume_name

__all__ = ["cut_into_pieces", "grid_counts"]

logger = logging.getLogger(__name__)


def grid_counts(
    dataset: Dataset[Any],
    volumes: Sequence[int],
    grid: GridPatchSamplesd,
    samples_per_volume: SamplesPerVolume | None = None,
    num_workers: int = 0,
) -> list[int]:
    """Number of patches of each of ``volumes``.

    Args:
        dataset: gives whole volumes.
        volumes: their numbers in the dataset.
        grid: cuts them.
        samples_per_volume: says the numbers.
        num_workers: processes to load volumes with whose shape is not known before; a warning is logged.

    Raises:
        ValueError: what ``samples_per_volume`` says makes no sense.
    """
    if samples_per_volume is not None:
        announced = count_patches(dataset, samples_per_volume)
        return [int(announced[volume]) for volume in volumes]
    counts: dict[int, int] = {}
    reasons: dict[int, str] = {}
    for volume in volumes:
        try:
            counts[volume] = grid_patch_count(dataset, volume, grid, transforms_of(dataset, volume))
        except ValueError as error:
            reasons[volume] = str(error)
    if reasons:
        first = next(iter(reasons))
        logger.warning(
            "%d of %d volumes are prepared once to count the patches of their grids, as their shape is not known "
            "before: %s: %s. Pass samples_per_volume to save that.",
            len(reasons),
            len(volumes),
            volume_name(dataset, first),
            reasons[first],
        )
        counts.update(zip(reasons, _loaded_counts(dataset, list(reasons), grid, num_workers), strict=True))
    return [counts[volume] for volume in volumes]


def cut_into_pieces(volumes: Sequence[int], counts: Sequence[int], most: int | None) -> list[GridPiece]:
    """Pieces of at most ``most`` patches, in order.

    >>> [(piece.first, piece.stop) for piece in cut_into_pieces([7], [5], 2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    return [
        GridPiece(volume, first, min(first + (most or count), count), count)
        for volume, count in zip(volumes, counts, strict=True)
        for first in range(0, count, most or count)
    ]


class _Counts(Dataset[int]):
    def __init__(self, dataset: Dataset[Any], volumes: Sequence[int], grid: GridPatchSamplesd) -> None:
        self.dataset = dataset
        self.volumes = volumes
        self.grid = grid

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> int:
        volume = self.volumes[index]
        try:
            return self.grid.of(whole_volume(self.dataset, volume)).count
        except Exception as error:
            raise Failure.of(error).exception(volume_name(self.dataset, volume), "to count its patches") from error


def _loaded_counts(
    dataset: Dataset[Any], volumes: Sequence[int], grid: GridPatchSamplesd, num_workers: int
) -> list[int]:
    loader = DataLoader(
        _Counts(dataset, volumes, grid),
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator(),  # the caller's random state is not for this
    )
    return [int(count) for count in tqdm(loader, desc="counting patches", unit="volume", delay=2.0)]
