# SPDX-License-Identifier: Apache-2.0
"""Positions of a regular grid of patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from .geometry import Box

__all__ = ["PatchGrid", "axis_starts", "overlap_voxels"]


def overlap_voxels(overlap: float | Sequence[float], size: Sequence[int]) -> tuple[int, ...]:
    """The overlap of neighbouring patches per axis.

    Args:
        overlap: an int is a number of voxels, a float a fraction of the patch (as MONAI's ``SlidingWindowSplitter``
            has it); one for all axes or one per axis.
        size: the patch's size.

    Raises:
        ValueError: if the number of overlaps is not the number of axes, or patches would not advance.

    >>> overlap_voxels(0.25, (64, 32)), overlap_voxels(4, (64, 32))
    ((16, 8), (4, 4))
    """
    overlaps = (overlap,) * len(size) if isinstance(overlap, int | float) else tuple(overlap)
    if len(overlaps) != len(size):
        raise ValueError(f"overlap {list(overlaps)} is for {len(overlaps)} spatial axes, the patch has {len(size)}")
    voxels = tuple(
        s - max(1, round(s - s * o)) if isinstance(o, float) else int(o) for o, s in zip(overlaps, size, strict=True)
    )
    if any(o >= s for o, s in zip(voxels, size, strict=True)):
        raise ValueError(f"an overlap of {list(voxels)} voxels must be smaller than the patch {list(size)}")
    return voxels


def axis_starts(length: int, size: int, overlap: int, pad: int = 0) -> list[int]:
    """Starts along one axis, ascending; the last one is moved back to the border.

    Args:
        length: voxels along the axis.
        size: the patch's size; where it is larger than the padded axis there is one start, with the volume in the
            patch's middle.
        overlap: voxels that neighbours share.
        pad: voxels added on either side.

    >>> axis_starts(10, 4, 1)
    [0, 3, 6]
    >>> axis_starts(10, 4, 0)
    [0, 4, 6]
    """
    last = length + pad - size
    if last <= -pad:
        return [-((size - length + 1) // 2)] if size > length + 2 * pad else [-pad]
    return [*range(-pad, last, size - overlap), last]


@dataclass(frozen=True)
class PatchGrid:
    """The patches of one volume's grid; they are numbered with the last axis fastest.

    Args:
        shape: the volume's spatial shape.
        size: the patch's size.
        overlap: voxels that neighbours share, per axis.
        pad_overlap: let the grid begin and end half an overlap outside (as TorchIO's ``GridSampler``).

    >>> grid = PatchGrid((10, 4), (4, 4), (1, 0))
    >>> grid.count, grid.start(2)
    (3, (6, 0))
    >>> [grid.cell(patch)[0] for patch in range(3)]
    [(0, 3), (3, 6), (6, 10)]
    """

    shape: tuple[int, ...]
    size: tuple[int, ...]
    overlap: tuple[int, ...]
    pad_overlap: bool = False

    @cached_property
    def axes(self) -> list[list[int]]:
        """Starts along each axis, ascending."""
        return [
            axis_starts(n, s, o, o // 2 if self.pad_overlap else 0)
            for n, s, o in zip(self.shape, self.size, self.overlap, strict=True)
        ]

    @property
    def starts(self) -> np.ndarray:
        """Starts of all patches; int64 of shape [n, axes]."""
        mesh = np.meshgrid(*self.axes, indexing="ij")
        return np.stack([axis.reshape(-1) for axis in mesh], axis=1).astype(np.int64)

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """Number of starts along each axis."""
        return tuple(map(len, self.axes))

    @property
    def count(self) -> int:
        """Number of patches."""
        return int(np.prod(self.steps))

    def start(self, patch: int) -> tuple[int, ...]:
        """First voxel of a patch; outside the volume where the patch overhangs."""
        return tuple(starts[i] for starts, i in zip(self.axes, self._place(patch), strict=True))

    def inside(self, patch: int) -> Box:
        """The voxels of the volume that a patch covers."""
        return tuple(
            (max(a, 0), min(a + s, n)) for a, s, n in zip(self.start(patch), self.size, self.shape, strict=True)
        )

    def cell(self, patch: int) -> Box:
        """A patch's own voxels, with overlaps divided in the middle: the cells of all patches fill the volume once."""
        return tuple((cuts[i], cuts[i + 1]) for cuts, i in zip(self._cuts, self._place(patch), strict=True))

    def _place(self, patch: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(patch, self.steps))

    @cached_property
    def _cuts(self) -> list[list[int]]:
        """Where one patch's own voxels end and the next one's begin, along each axis."""
        cuts = []
        for n, s, starts in zip(self.shape, self.size, self.axes, strict=True):
            middles = [(a + s + b) // 2 for a, b in pairwise(starts)]
            cuts.append([0, *(min(max(middle, 0), n) for middle in middles), n])
        return cuts
