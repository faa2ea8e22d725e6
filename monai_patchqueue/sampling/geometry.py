# SPDX-License-Identifier: Apache-2.0
"""Which patch positions are legal, and how a patch's start and its center belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

__all__ = ["BORDERS", "Box", "PatchGeometry", "resolve_size"]

BORDERS = ("inside", "clamp", "pad")
Box = tuple[tuple[int, int], ...]
"""Per axis the first voxel and the one after the last."""


def resolve_size(spatial_size: int | Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """The patch's size in a volume: an int stands for every axis, -1 for the whole axis.

    Args:
        spatial_size: one size for all axes, or one per axis.
        shape: spatial shape of the volume.

    Raises:
        ValueError: if the number of sizes is not the number of spatial axes.

    >>> resolve_size((64, -1), (100, 80))
    (64, 80)
    """
    sizes = (spatial_size,) * len(shape) if isinstance(spatial_size, int) else tuple(spatial_size)
    if len(sizes) != len(shape):
        raise ValueError(
            f"spatial_size {list(sizes)} is for {len(sizes)} spatial axes, but the volume has {len(shape)} "
            f"(spatial shape {list(shape)})"
        )
    return tuple(n if s == -1 else s for s, n in zip(sizes, shape, strict=True))


@dataclass(frozen=True)
class PatchGeometry:
    """Legal patches of one size in a volume of one shape.

    A patch of size ``s`` at start ``a`` has its center at ``a + s // 2`` (as TorchIO has it). What is legal at the
    border is said by ``border``:

    - ``"inside"``: every start 0 … N - s, so centers are s // 2 … N - s + s // 2;
    - ``"clamp"``: every voxel may be chosen, the patch is moved inside;
    - ``"pad"``: every voxel is a center, the patch may overhang.

    Along an axis shorter than the patch, ``"inside"`` and ``"clamp"`` know one start, the one that has the volume in
    the patch's middle and the patch's center in the volume.

    Args:
        shape: the volume's spatial shape.
        size: the patch's spatial size.
        border: one of :data:`BORDERS`.

    >>> geometry = PatchGeometry((10,), (4,))
    >>> geometry.box
    ((2, 9),)
    >>> geometry.starts(np.array([[2], [8]])).tolist()
    [[0], [6]]
    """

    shape: tuple[int, ...]
    size: tuple[int, ...]
    border: str = "inside"

    @cached_property
    def fits(self) -> bool:
        """Whether the volume is nowhere smaller than the patch."""
        return all(s <= n for s, n in zip(self.size, self.shape, strict=True))

    @cached_property
    def half(self) -> np.ndarray:
        """From a patch's start to its center."""
        return np.array([s // 2 for s in self.size], dtype=np.int64)

    @cached_property
    def _inside_starts(self) -> Box:
        """Per axis the first and the last start."""
        excesses = [n - s for n, s in zip(self.shape, self.size, strict=True)]
        return tuple((0, excess) if excess >= 0 else (-((1 - excess) // 2),) * 2 for excess in excesses)

    @cached_property
    def box(self) -> Box:
        """The voxels that may be chosen: per axis the first and the one after the last."""
        if self.border != "inside":
            return tuple((0, n) for n in self.shape)
        return tuple(
            (first + s // 2, last + s // 2 + 1) for (first, last), s in zip(self._inside_starts, self.size, strict=True)
        )

    def starts(self, chosen: np.ndarray) -> np.ndarray:
        """Starts of the patches for chosen voxels.

        Args:
            chosen: integers of shape [n, axes], voxels of :attr:`box`.

        Returns:
            int64 starts of shape [n, axes]; negative, or nearer to the end than the patch's size, where it overhangs.
        """
        starts: np.ndarray = np.asarray(chosen, dtype=np.int64) - self.half
        return np.clip(starts, *np.array(self._inside_starts).T) if self.border == "clamp" else starts

    def overhangs(self, starts: np.ndarray) -> bool:
        """Whether any of the patches reaches over the volume's border."""
        return bool((starts < 0).any() or (starts + np.array(self.size) > np.array(self.shape)).any())

    def draw_uniform(self, n: int, rng: np.random.RandomState) -> np.ndarray:
        """Draw ``n`` voxels of :attr:`box`, each equally likely.

        Returns:
            int64 voxels of shape [n, axes].
        """
        low, high = np.array(self.box, dtype=np.int64).T
        return rng.randint(low, high, size=(n, len(self.shape)), dtype=np.int64)
