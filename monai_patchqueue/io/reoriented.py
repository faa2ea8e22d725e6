# SPDX-License-Identifier: Apache-2.0
"""Stored arrays whose axes are taken in another order or direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .chunks import ChunkedFile
from .regions import StoredFile
from .zarr_arrays import ZarrArray

__all__ = ["ReorientedArray"]


class ReorientedArray:
    """A stored array with its axes permuted and some of them reversed; regions are read as they are asked for.

    Args:
        stored: the array.
        axes: for each axis, the stored one that it is.
        reversed_axes: for each axis, whether it runs backwards.

    Example:
        >>> ReorientedArray(np.arange(6).reshape(2, 3), (1, 0), (True, False))[0:2, 0:2]
        array([[2, 5],
               [1, 4]])
    """

    def __init__(
        self,
        stored: np.ndarray | StoredFile | ChunkedFile | ReorientedArray | ZarrArray,
        axes: Sequence[int],
        reversed_axes: Sequence[bool],
    ) -> None:
        self.stored = stored
        self.axes = tuple(axes)
        self.reversed_axes = tuple(reversed_axes)
        self.shape: tuple[int, ...] = tuple(int(stored.shape[axis]) for axis in axes)
        self.dtype: np.dtype[Any] = stored.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """A region: one slice without a step for each axis."""
        region = [slice(None)] * len(self.axes)
        for entry, n, axis, backwards in zip(index, self.shape, self.axes, self.reversed_axes, strict=True):
            start, stop, _ = entry.indices(n)
            region[axis] = slice(n - stop, n - start) if backwards else slice(start, stop)
        part = np.asarray(self.stored[tuple(region)]).transpose(self.axes)
        turned: np.ndarray = part[tuple(slice(None, None, -1 if backwards else 1) for backwards in self.reversed_axes)]
        return turned
