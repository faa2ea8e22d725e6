# SPDX-License-Identifier: Apache-2.0
"""Drawing voxels in proportion to a weight map, without a cumulative sum over the volume.

A cumulative sum in float32 saturates at 2**24 and one in float64 needs eight bytes a voxel. Here only row sums are
kept: a row is drawn by its sum, then a voxel by the cumulative sum of that row alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from .choose import choose
from .geometry import Box
from .memory_order import AxisOrder, blocks
from .recent import remember

__all__ = ["WeightIndex"]

SHORT_ROW = 512  # float32 sums of so few numbers are right to about 2e-7
KEPT_REGIONS = 4


class WeightIndex:
    """Row sums of a weight map, for any number of boxes of legal centers.

    The index does not keep the map: the same map is handed to :meth:`draw` again.

    Args:
        weights: a map with the volume's spatial shape, of any real dtype and any memory order.

    Raises:
        ValueError: if a weight is negative, NaN or infinite.

    >>> index = WeightIndex(weights := np.array([[0, 0, 1], [0, 3, 0]], dtype=np.float32))
    >>> sorted(set(map(tuple, index.draw(weights, ((0, 2), (0, 3)), 50, np.random.RandomState(0)).tolist())))
    [(0, 2), (1, 1)]
    """

    def __init__(self, weights: np.ndarray) -> None:
        self.shape = weights.shape
        self._order = AxisOrder.of(weights)
        self._checked = False
        self._regions: dict[Box, np.ndarray] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that the index takes."""
        return sum(sums.nbytes for sums in list(self._regions.values()))

    def prepare(self, weights: np.ndarray) -> None:
        """Check the map now, and sum its rows for boxes that cover the volume."""
        self._cumulative(weights, tuple((0, n) for n in self.shape))

    def sums(self, weights: np.ndarray, box: Box) -> np.ndarray:
        """Cumulative row sums of a box: what :meth:`of_sums` needs to draw from it."""
        return self._cumulative(weights, box)

    @classmethod
    def of_sums(cls, shape: tuple[int, ...], sums: Mapping[Box, np.ndarray]) -> WeightIndex:
        """The index of a C-ordered map whose sums were kept; of the map that it is handed only drawn rows are read."""
        index = cls.__new__(cls)
        index.shape, index._order = shape, AxisOrder(tuple(range(len(shape))))
        index._checked, index._regions = True, dict(sums)
        return index

    def draw(self, weights: Any, box: Box, n: int, rng: np.random.RandomState) -> np.ndarray | None:
        """Draw ``n`` voxels of ``box`` in proportion to their weights; a weight of zero is never drawn.

        Args:
            weights: the map this index was made of, or what reads rows of it.
            box: legal centers, per axis the first and the one after the last.
            n: number of voxels.
            rng: where the randomness comes from.

        Returns:
            int64 voxels of shape [n, axes], or None where all weights of the box are zero.
        """
        cumulative = self._cumulative(weights, box)
        if not cumulative.size or not cumulative[-1] > 0:
            return None
        ordered: np.ndarray = self._order.view(weights)
        bounds = self._order.box(box)
        first = [a for a, _ in bounds]
        *outer, length = [b - a for a, b in bounds]
        parts = _parts(length)
        picked = choose(cumulative, rng.random_sample(n))
        rows = np.unravel_index(picked // len(parts), tuple(outer)) if outer else ()
        voxels = np.empty((n, len(bounds)), dtype=np.int64)
        for i, where in enumerate(rng.random_sample(n)):
            part = parts[picked[i] % len(parts)]
            at: tuple[Any, ...] = tuple(int(axis[i]) + a for axis, a in zip(rows, first, strict=False))
            at += (slice(first[-1] + part.start, first[-1] + part.stop),)
            row = ordered[at]
            voxels[i, -1] = part.start + choose(np.cumsum(row, dtype=np.float64), where)
        for axis, index in enumerate(rows):
            voxels[:, axis] = index
        voxels += np.array(first, dtype=np.int64)
        return self._order.restore(voxels)

    def _cumulative(self, weights: np.ndarray, box: Box) -> np.ndarray:
        known = self._regions.get(box)
        if known is not None:
            return known
        cumulative = np.cumsum(self._row_sums(weights, box))
        if cumulative.size and not np.isfinite(cumulative[-1]):
            raise ValueError("the sum of the weights overflows float64: scale the map down")
        return remember(self._regions, box, cumulative, KEPT_REGIONS)

    def _row_sums(self, weights: np.ndarray, box: Box) -> np.ndarray:
        """Sums of the rows of a box, a long row in parts, in memory order; checks the whole map in the same pass."""
        ordered, bounds = self._order.view(weights), self._order.box(box)
        parts = _parts(bounds[-1][1] - bounds[-1][0])
        lead, inner = bounds[0], tuple(slice(a, b) for a, b in bounds[1:])
        if ordered.ndim == 1:
            if not self._checked:
                _check(ordered)
            self._checked = True
            return np.array([_sum_last_axis(ordered[lead[0] + p.start : lead[0] + p.stop]) for p in parts])
        sums = np.empty((*(b - a for a, b in bounds[:-1]), len(parts)), dtype=np.float64)
        for piece in blocks(ordered.shape):
            if not self._checked:
                _check(ordered[piece])
            first, stop = max(piece.start, lead[0]), min(piece.stop, lead[1])
            if first >= stop:
                continue
            at = (slice(first, stop), *inner)
            legal = ordered[at]
            for i, part in enumerate(parts):
                sums[first - lead[0] : stop - lead[0], ..., i] = _sum_last_axis(legal[..., part])
        self._checked = True
        return sums.reshape(prod(sums.shape))


def _parts(length: int) -> list[slice]:
    return [slice(a, min(a + SHORT_ROW, length)) for a in range(0, length, SHORT_ROW)]


def _sum_last_axis(rows: np.ndarray) -> np.ndarray:
    """Row sums, in float32 for what float32 holds exactly (einsum is numpy's fastest and does not use threads)."""
    small = rows.dtype.itemsize <= 2 or rows.dtype == np.float32
    native = rows.astype(np.float32 if small else np.float64, copy=False)
    sums: np.ndarray = np.einsum("...i->...", native)
    return sums if np.isfinite(sums).all() else rows.astype(np.float64).sum(axis=-1)


def _check(weights: np.ndarray) -> None:
    """Raise for negative, NaN and infinite weights."""
    dtype = weights.dtype
    if dtype.kind in "ub" or not weights.size:
        return
    if dtype.kind == "f" and dtype.itemsize in (2, 4, 8) and dtype.isnative:
        # One integer maximum sees all three: NaN and the sign bit lie above infinity, all legal weights below.
        bits = np.dtype(f"u{dtype.itemsize}")
        if weights.view(bits).max() < np.array(np.inf, dtype=dtype).view(bits):
            return
    if dtype.kind not in "if":
        raise ValueError(f"a weight map must hold real numbers, got dtype {dtype}")
    if not np.isfinite(weights).all():
        raise ValueError("the weight map holds NaN or infinite values")
    if weights.min() < 0:
        raise ValueError(f"the weight map holds negative values, down to {weights.min():g}")
