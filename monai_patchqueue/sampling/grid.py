# SPDX-License-Identifier: Apache-2.0
"""Positions of a regular grid of patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["axis_starts", "count_grid_patches", "grid_starts", "overlap_voxels"]


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


def _starts_per_axis(
    shape: Sequence[int], size: Sequence[int], overlap: Sequence[int], pad_overlap: bool
) -> list[list[int]]:
    return [axis_starts(n, s, o, o // 2 if pad_overlap else 0) for n, s, o in zip(shape, size, overlap, strict=True)]


def grid_starts(
    shape: Sequence[int], size: Sequence[int], overlap: Sequence[int], pad_overlap: bool = False
) -> np.ndarray:
    """Starts of every patch of the grid, the last axis fastest.

    Args:
        shape: the volume's spatial shape.
        size: the patch's size.
        overlap: voxels that neighbours share, per axis.
        pad_overlap: let the grid begin and end half an overlap outside (as TorchIO's ``GridSampler``).

    Returns:
        int64 starts of shape [n, axes].

    >>> grid_starts((4, 5), (4, 3), (0, 0)).tolist()
    [[0, 0], [0, 2]]
    """
    axes = np.meshgrid(*_starts_per_axis(shape, size, overlap, pad_overlap), indexing="ij")
    return np.stack([a.reshape(-1) for a in axes], axis=1).astype(np.int64)


def count_grid_patches(
    shape: Sequence[int], size: Sequence[int], overlap: Sequence[int], pad_overlap: bool = False
) -> int:
    """How many patches :func:`grid_starts` gives.

    >>> count_grid_patches((10, 10), (4, 4), (0, 0))
    9
    """
    count = 1
    for starts in _starts_per_axis(shape, size, overlap, pad_overlap):
        count *= len(starts)
    return count
