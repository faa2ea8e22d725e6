# SPDX-License-Identifier: Apache-2.0
"""From stored numbers to intensities: the scale of a NIfTI header, and the dtype that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.volumeutils import apply_read_scaling

__all__ = ["Scaling"]


@dataclass(frozen=True)
class Scaling:
    """``stored * slope + inter``, computed as nibabel computes it, and then cast.

    Each voxel is converted by itself, so a patch has the very values that it has in a whole volume that is converted.

    Args:
        slope: factor.
        inter: summand.
        dtype: of the result; None leaves it as the scaling gives it.

    Example:
        >>> Scaling(0.5, 1, np.dtype(np.float32))(np.array([2, 3], np.int16))
        array([2. , 2.5], dtype=float32)
    """

    slope: float = 1.0
    inter: float = 0.0
    dtype: np.dtype[Any] | None = None

    @property
    def is_identity(self) -> bool:
        """Whether only a cast is left to do."""
        return (self.slope, self.inter) == (1, 0)

    def result_dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """The dtype that stored numbers are converted to; in the machine's byte order."""
        if self.dtype is not None:
            return self.dtype
        scaled: np.dtype[Any] = self._scale(np.zeros(1, stored)).dtype
        native: np.dtype[Any] = scaled.newbyteorder("=")
        return native

    def keeps_values(self, stored: np.dtype[Any]) -> bool:
        """Whether stored numbers and intensities are equal, whatever they are."""
        return self.is_identity and np.can_cast(stored, self.result_dtype(stored), "safe")

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        """Intensities of stored numbers, in the same order of axes in memory; the argument itself if that is them."""
        scaled: np.ndarray = self._scale(stored).astype(self.result_dtype(stored.dtype), order="K", copy=False)
        return scaled

    def into(self, out: np.ndarray, stored: np.ndarray) -> None:
        """Convert ``stored`` into ``out``, which has its shape."""
        np.copyto(out, self._scale(stored), casting="unsafe")

    def _scale(self, stored: np.ndarray) -> np.ndarray:
        if self.is_identity:
            return stored
        scaled: np.ndarray = apply_read_scaling(stored, np.float64(self.slope), np.float64(self.inter))
        return scaled


def pieces(n: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``n`` elements, in order."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
