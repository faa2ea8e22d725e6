# SPDX-License-Identifier: Apache-2.0
"""A dataset of volumes as a dataset of pieces of their grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch.utils.data import Dataset

from ..transforms import GridPatchSamplesd

__all__ = ["GRID_PATCH", "GridPiece", "GridPieces", "whole_volume"]

GRID_PATCH = "grid_patch"
"""Key under which a patch says which one of which volume's grid it is."""


@dataclass(frozen=True)
class GridPiece:
    """Patches ``first`` … ``stop`` - 1 of the ``count`` that a volume's grid has."""

    volume: int
    first: int
    stop: int
    count: int


class GridPieces(Dataset[Any]):
    """Each item is the list of one piece's patches; under ``"grid_patch"`` a patch says where it belongs.

    A volume is kept until its last piece has been cut, so that whoever cuts several in a row loads it once.

    Args:
        dataset: gives whole volumes, as dictionaries.
        grid: cuts them.
        pieces: which patches.
    """

    def __init__(self, dataset: Dataset[Any], grid: GridPatchSamplesd, pieces: Sequence[GridPiece]) -> None:
        self.dataset = dataset
        self.grid = grid
        self.pieces = list(pieces)
        self._kept: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> list[dict[Any, Any]]:
        piece = self.pieces[index]
        volume = self._load(piece)
        grid = self.grid.of(volume)
        if grid.count != piece.count:
            raise ValueError(
                f"its grid has {grid.count} patches (spatial shape {list(grid.shape)}), but "
                f"{piece.count} were announced. Correct samples_per_volume; transforms that change a volume's size at "
                "random do not go with a grid."
            )
        patches = self.grid(volume, first=piece.first, stop=piece.stop)
        shared = {
            "volume": piece.volume,
            "shape": np.array(grid.shape),
            "size": np.array(grid.size),
            "overlap": np.array(grid.overlap),
            "pad_overlap": grid.pad_overlap,
        }
        image = volume[next(key for key in self.grid.keys if key in volume)]
        if hasattr(image, "affine"):
            pending = isinstance(image, MetaTensor) and image.pending_operations
            affine = image.peek_pending_affine() if pending else image.affine
            shared["affine"] = torch.as_tensor(affine, dtype=torch.float64, device="cpu")
        for number, patch in enumerate(patches, start=piece.first):
            patch[GRID_PATCH] = {**shared, "patch": number}
        return patches

    def _load(self, piece: GridPiece) -> Any:
        if self._kept is not None and self._kept[0] == piece.volume:
            volume = self._kept[1]
        else:
            self._kept = None  # before the next one is loaded
            volume = whole_volume(self.dataset, piece.volume)
        self._kept = (piece.volume, volume) if piece.stop < piece.count else None
        return volume


def whole_volume(dataset: Dataset[Any], index: int) -> Mapping[Any, Any]:
    """A volume as the dataset gives it.

    Raises:
        TypeError: an item that is no dictionary.
    """
    item = dataset[index]
    if not isinstance(item, Mapping):
        raise TypeError(
            f"a grid is laid over whole volumes, as dictionaries; the dataset gives a {type(item).__name__}. Leave "
            "transforms that take patches out of it: GridPatchLoader has the grid."
        )
    return item
