# SPDX-License-Identifier: Apache-2.0
"""Whether drawn voxels follow exact probabilities."""

from __future__ import annotations

import numpy as np
from scipy import stats


def frequencies(voxels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """How often each voxel was drawn."""
    flat = np.ravel_multi_index(tuple(voxels.T), shape)
    return np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape)


def p_value(observed: np.ndarray, probabilities: np.ndarray) -> float:
    """Chi-square p-value; 0 where something impossible was drawn."""
    possible = probabilities > 0
    if observed[~possible].any():
        return 0.0
    expected = probabilities[possible].astype(np.float64)
    expected *= observed.sum() / expected.sum()
    return 1.0 if expected.size == 1 else float(stats.chisquare(observed[possible], expected).pvalue)


def in_box(box: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> np.ndarray:
    """Which voxels lie in a box."""
    inside = np.zeros(shape, dtype=bool)
    inside[tuple(slice(a, b) for a, b in box)] = True
    return inside
