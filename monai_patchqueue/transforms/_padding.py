# SPDX-License-Identifier: Apache-2.0
"""Cutting patches that overhang their volume, as if the whole volume had been padded first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch

from ._arguments import is_real

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
        if is_real(padding_mode):
            return cls("constant", padding_mode)
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
    if fill.mode == "constant":
        within = tuple(slice(max(a, 0), min(a + s, n)) for n, a, s in zip(shape, start, size, strict=True))
        return _surround(read(within), [max(-a, 0) for a in start], size, fill.value)
    sources = [_source(np.arange(a, a + s), n, fill.mode) for n, a, s in zip(shape, start, size, strict=True)]
    lows = [int(source.min()) for source in sources]
    patch = read(tuple(slice(low, int(source.max()) + 1) for low, source in zip(lows, sources, strict=True)))
    for axis, (low, source) in enumerate(zip(lows, sources, strict=True), start=1):
        if _is_tensor(patch):
            patch = patch.index_select(axis, torch.as_tensor(source - low, device=patch.device))
        else:
            patch = patch.take(source - low, axis=axis)
    return patch


def _source(positions: np.ndarray, n: int, mode: str) -> np.ndarray:
    """The voxel that each position shows."""
    if mode == "wrap":
        source: np.ndarray = np.mod(positions, n)
    elif mode == "edge" or n == 1:
        source = np.clip(positions, 0, n - 1)
    else:
        period, turn = (2 * n, 2 * n - 1) if mode == "symmetric" else (2 * n - 2, 2 * n - 2)
        folded = np.mod(positions, period)
        source = np.where(folded < n, folded, turn - folded)
    return source


def _surround(inner: Any, before: Sequence[int], size: Sequence[int], value: float) -> Any:
    """``inner`` in a patch of ``value``, in the same order of axes in memory."""
    shape = (inner.shape[0], *size)
    at = (slice(None), *(slice(b, b + n) for b, n in zip(before, inner.shape[1:], strict=True)))
    if _is_tensor(inner):
        order = sorted(range(inner.ndim), key=lambda axis: (-inner.stride(axis), axis))
        patch = inner.new_full([shape[axis] for axis in order], value).permute(np.argsort(order).tolist())
    else:
        patch = np.full_like(inner, value, order="K", shape=shape)
    patch[at] = inner
    return patch


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
