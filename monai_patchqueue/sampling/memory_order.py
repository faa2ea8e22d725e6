# SPDX-License-Identifier: Apache-2.0
"""Reading volumes in the order in which they lie in memory.

NIfTI files are Fortran-ordered and MONAI's channel-first tensors are often permuted views. Making such a volume
C-contiguous costs as much as decoding it, so an index is built over the axes sorted by stride, slowest first, in pieces
that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from .geometry import Box

__all__ = ["AxisOrder", "as_array", "blocks"]

BLOCK_VOXELS = 1 << 19


def as_array(volume: Any) -> np.ndarray:
    """A volume as numpy array, without copying where it lies in main memory.

    Args:
        volume: numpy array, tensor on any device, or an array-like with ``shape`` and ``__getitem__``.
    """
    if isinstance(volume, np.ndarray):
        return volume.view(np.ndarray)
    if isinstance(volume, torch.Tensor):
        tensor = volume.detach().as_subclass(torch.Tensor).cpu()
        array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return array
    return as_array(volume[(slice(None),) * len(volume.shape)]) if hasattr(volume, "shape") else np.asarray(volume)


def blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of the first axis that hold about :data:`BLOCK_VOXELS` voxels each."""
    step = max(1, BLOCK_VOXELS // max(1, prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield slice(first, min(first + step, shape[0]))


class AxisOrder:
    """The axes of an array from the slowest to the fastest in memory.

    >>> order = AxisOrder.of(np.zeros((2, 3, 4), order="F"))
    >>> order.axes
    (2, 1, 0)
    """

    __slots__ = ("axes",)

    def __init__(self, axes: tuple[int, ...]) -> None:
        self.axes = axes

    @classmethod
    def of(cls, array: np.ndarray) -> AxisOrder:
        """The order in which an array's axes lie in memory."""
        return cls(tuple(sorted(range(array.ndim), key=lambda axis: (-abs(array.strides[axis]), axis))))

    def view(self, array: np.ndarray) -> np.ndarray:
        """The array with its axes in memory order."""
        if self.axes == tuple(range(len(self.axes))):
            return array  # which may be one that is read lazily
        ordered: np.ndarray = array.transpose(self.axes)
        return ordered

    def box(self, box: Box) -> Box:
        """A box with its axes in memory order."""
        return tuple(box[axis] for axis in self.axes)

    def restore(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels [n, axes] given in memory order, in the array's own order of axes."""
        restored = np.empty_like(voxels)
        restored[:, list(self.axes)] = voxels
        return restored
