# SPDX-License-Identifier: Apache-2.0
"""Cutting patches that overhang their volume, as if the whole volume had been padded first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import Any

import numpy as np
import torch

NUMPY_ONLY = ("linear_ramp", "maximum", "mean", "median", "minimum", "empty")
SYNONYMS = {"replicate": "edge", "circular": "wrap"}
MODES = ("constant", "edge", "reflect", "symmetric", "wrap", *SYNONYMS, *NUMPY_ONLY)


@dataclass(frozen=True)
class Fill:
    """How voxels outside the volume are made: a mode by numpy's name, and the value for ``"constant"``."""

    mode: str = "constant"
    value: float = 0

    @classmethod
    def of(cls, padding_mode: Any) -> Fill | None:
        """From ``padding_mode``: torch's or numpy's name of a mode, or a number for a constant."""
        if padding_mode is None:
            return None
        if isinstance(padding_mode, Enum):
            padding_mode = padding_mode.value
        if isinstance(padding_mode, Real) and not isinstance(padding_mode, bool):
            return cls("constant", float(padding_mode) if not isinstance(padding_mode, int) else padding_mode)
        if not isinstance(padding_mode, str):
            raise TypeError(f"padding_mode must be a mode's name or a number, got {padding_mode!r}")
        if padding_mode not in MODES:
            raise ValueError(f"padding_mode must be a number or one of {', '.join(MODES)}, got {padding_mode!r}")
        return cls(SYNONYMS.get(padding_mode, padding_mode))


def read_padded(
    read: Callable[[tuple[slice, ...]], Any],
    shape: Sequence[int],
    start: Sequence[int],
    size: Sequence[int],
    fill: Fill,
) -> Any:
    """A channel-first patch that may overhang.

    Args:
        read: gives the volume's voxels for one slice per spatial axis (channels included), as array or tensor.
        shape: the volume's spatial shape.
        start: the patch's start, which may be negative.
        size: the patch's size.
        fill: what lies outside.
    """
    if fill.mode in NUMPY_ONLY:
        return _read_numpy_padded(read, shape, start, size, fill.mode)
    within, picks = [], []
    for n, a, s in zip(shape, start, size, strict=True):
        source = _source(np.arange(a, a + s), n, fill.mode)
        used = source[source >= 0]
        low, high = (int(used.min()), int(used.max()) + 1) if used.size else (0, 0)
        within.append(slice(low, high))
        picks.append(
            None if source.size == high - low and (source[0] == low) else source - np.where(source < 0, 0, low)
        )
    patch = read(tuple(within))
    for axis, pick in enumerate(picks, start=1):
        if pick is not None:
            patch = _take(patch, axis, pick, fill.value)
    return patch


def _source(positions: np.ndarray, n: int, mode: str) -> np.ndarray:
    """The voxel that each position shows; -1 where a constant stands."""
    if mode == "constant":
        return np.where((positions >= 0) & (positions < n), positions, -1)
    if mode == "edge" or n == 1:
        return np.clip(positions, 0, n - 1)
    if mode == "wrap":
        return positions % n
    period = 2 * n if mode == "symmetric" else 2 * n - 2
    folded = positions % period
    return np.where(folded < n, folded, (period - 1 if mode == "symmetric" else period) - folded)


def _take(patch: Any, axis: int, pick: np.ndarray, value: float) -> Any:
    """``patch`` with the voxels ``pick`` along ``axis``; a negative one stands for the constant."""
    known = np.flatnonzero(pick >= 0)
    shape = list(patch.shape)
    shape[axis] = pick.size
    where = (slice(None),) * axis
    if known.size == pick.size:
        return (
            patch.index_select(axis, torch.as_tensor(pick, device=patch.device))
            if _is_tensor(patch)
            else patch.take(pick, axis=axis)
        )
    if _is_tensor(patch):
        padded = patch.new_full(shape, value)
    else:
        padded = np.full(shape, value, dtype=patch.dtype)
    if known.size:  # a constant's voxels lie together
        padded[(*where, slice(int(known[0]), int(known[-1]) + 1))] = patch
    return padded


def _is_tensor(array: Any) -> bool:
    return isinstance(array, torch.Tensor)


def _read_numpy_padded(
    read: Callable[[tuple[slice, ...]], Any], shape: Sequence[int], start: Sequence[int], size: Sequence[int], mode: str
) -> Any:
    """Modes that look at whole lines: numpy pads the lines that overhang."""
    within, widths, cut = [], [(0, 0)], [slice(None)]
    for n, a, s in zip(shape, start, size, strict=True):
        before, after = max(0, -a), max(0, a + s - n)
        whole = before > 0 or after > 0
        within.append(slice(0, n) if whole else slice(a, a + s))
        widths.append((before, after))
        cut.append(slice(a + before, a + before + s) if whole else slice(None))
    lines = read(tuple(within))
    as_numpy = lines.detach().cpu().numpy() if _is_tensor(lines) else np.asarray(lines)
    padded = np.pad(as_numpy, widths, mode=mode)[tuple(cut)]  # type: ignore[call-overload]
    return torch.as_tensor(padded.copy(), device=lines.device) if _is_tensor(lines) else padded
