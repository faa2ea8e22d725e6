# SPDX-License-Identifier: Apache-2.0
"""Keeping numbers in fewer bytes where nothing is lost: scanners give integers, and MONAI makes floats of them."""

from __future__ import annotations

import numpy as np

__all__ = ["narrowed"]

_NARROWER = [np.dtype(t) for t in ("u1", "i1", "u2", "i2", "u4", "i4", "f4")]


def narrowed(array: np.ndarray) -> np.ndarray:
    """The array in the smallest dtype that gives back the very bits when it is cast to the array's own.

    >>> narrowed(np.array([0.0, 255.0], np.float32)).dtype, narrowed(np.array([-0.0, 0.5], np.float32)).dtype
    (dtype('uint8'), dtype('float32'))
    """
    dtype = array.dtype
    if dtype.kind not in "iuf" or dtype.itemsize == 1 or not array.size:
        return array
    low, high = array.min(), array.max()  # NaN where there is one
    for smaller in _NARROWER:
        if smaller.itemsize >= dtype.itemsize:
            break
        if smaller.kind != "f" and not (np.iinfo(smaller).min <= low and high <= np.iinfo(smaller).max):
            continue
        if smaller.kind == "f" and dtype.kind != "f":
            continue
        with np.errstate(all="ignore"):
            candidate = array.astype(smaller)
        if _same_bits(candidate.astype(dtype), array):
            return candidate
    return array


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one dtype are equal to the bit: zeros of either sign differ, NaN equals itself."""
    if a.dtype.kind != "f" or a.dtype.itemsize not in (2, 4, 8):
        return bool(np.array_equal(a, b))
    bits = f"u{a.dtype.itemsize}"
    return bool(np.array_equal(a.view(bits), np.ascontiguousarray(b).view(bits)))
