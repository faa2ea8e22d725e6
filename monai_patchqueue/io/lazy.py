# SPDX-License-Identifier: Apache-2.0
"""Volumes of which the parts that are asked for are read and converted."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import MetaKeys

from .chunks import ChunkedFile
from .regions import StoredFile
from .scaling import Scaling
from .zarr_arrays import ZarrArray

__all__ = ["LazyVolume"]


class LazyVolume:
    """A channel-first volume that is read and converted where it is cut: an array-like.

    A pipeline has it as :class:`LazyMetaTensor`.

    Args:
        stored: the stored numbers: an array, or anything with ``shape``, ``dtype`` and ``__getitem__`` that is given
            one slice for each axis.
        scaling: from stored numbers to intensities.
        meta: metadata, with the ``affine``.
        channel_axis: the axis of ``stored`` that has the channels; None if there is none, and one is to be added.
        source: tells what is stored from all else, so that what is found out of it can be kept; None: it is not.

    Example:
        >>> volume = LazyVolume(np.arange(6, dtype=np.int16).reshape(2, 3), Scaling(0.5, dtype=np.dtype(np.float32)))
        >>> volume
        LazyVolume(shape=(1, 2, 3), dtype=float32)
        >>> volume[:, 1:, :2]
        array([[[1.5, 2. ]]], dtype=float32)
    """

    kind = "MetaTensor"
    """What the whole volume is loaded as, and what patches are: ``"MetaTensor"``, ``"tensor"`` or ``"array"``."""

    def __init__(
        self,
        stored: np.ndarray | StoredFile | ChunkedFile | ZarrArray,
        scaling: Scaling,
        meta: dict[Any, Any] | None = None,
        channel_axis: int | None = None,
        source: Hashable = None,
    ) -> None:
        self._stored = stored
        self._scaling = scaling
        self._channel_axis = None if channel_axis is None else range(len(stored.shape))[channel_axis]
        self.meta = {MetaKeys.AFFINE: torch.eye(4, dtype=torch.float64)} if meta is None else meta
        self.source = None if source is None else (source, scaling, self._channel_axis)
        """What tells the volume's values from any others; None where that is not known."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, and the spatial axes."""
        shape = list(self._stored.shape)
        channels = 1 if self._channel_axis is None else shape.pop(self._channel_axis)
        return (channels, *shape)

    @property
    def ndim(self) -> int:
        """Number of axes, that of the channels included."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of what indexing gives."""
        return self._scaling.result_dtype(self._stored.dtype)

    @cached_property
    def narrow_dtype(self) -> np.dtype[Any] | None:
        """A dtype of fewer bytes, from which a cast gives the values: the stored one; None if it is not such."""
        stored = self._stored.dtype.newbyteorder("=")
        return stored if self._scaling.is_identity and stored.itemsize < self.dtype.itemsize else None

    def strides(self, order: str | None = None) -> tuple[int, ...]:
        """How far apart, in voxels, neighbours along each axis lie in the volume once it is in memory.

        Args:
            order: of the stored axes there: ``"C"`` or ``"F"``; None: the one that they are stored in.
        """
        shape, stored = self._stored.shape, self._stored
        if isinstance(stored, np.ndarray) and order is None:
            slowest_first = sorted(range(len(shape)), key=lambda axis: (-abs(stored.strides[axis]), axis))
        else:
            slowest_first = list(range(len(shape)))
            if (order or getattr(stored, "order", "C")) == "F":
                slowest_first.reverse()
        strides, step = [0] * len(shape), 1
        for axis in reversed(slowest_first):
            strides[axis], step = step, step * int(shape[axis])
        channels = 0 if self._channel_axis is None else strides.pop(self._channel_axis)
        return (channels, *strides)

    def __getitem__(self, index: Any) -> np.ndarray:
        """A part of the volume as array.

        Args:
            index: ints and slices, for the first axes or all of them.

        Returns:
            The part, converted; it may share memory with the volume.

        Raises:
            IndexError: if there are more entries than axes, or one is out of range.
            TypeError: if one is neither int nor slice.
        """
        entries = index if isinstance(index, tuple) else (index,)
        if len(entries) > self.ndim:
            raise IndexError(f"{len(entries)} indices for a volume with {self.ndim} axes")
        entries = (*entries, *[slice(None)] * (self.ndim - len(entries)))
        spans = [_span(entry, n) for entry, n in zip(entries, self.shape, strict=True)]
        part = self._scaling(self._read([span for span, _ in spans]))
        if all(rest == slice(None) for _, rest in spans):
            return part  # not a view, where it was converted: a crop need not copy it
        rest_of_it: np.ndarray = part[tuple(rest for _, rest in spans)]
        return rest_of_it

    def stored_part(self, spans: Sequence[slice]) -> tuple[np.ndarray, Scaling]:
        """Stored numbers of a box, and how to convert them.

        Args:
            spans: a slice without a step for each axis.
        """
        return self._read(spans), self._scaling

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[()]
        whole = whole if dtype is None else whole.astype(dtype, copy=False)
        return whole.copy("K") if copy and whole.base is not None else whole

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"

    def values(self) -> np.ndarray:
        """The whole volume, in the stored dtype if that has the same values: what a label is indexed by."""
        if self._scaling.keeps_values(self._stored.dtype) and self._stored.dtype.isnative:
            return self._read([slice(0, n) for n in self.shape])
        return self[()]

    def load(self) -> MetaTensor:
        """The whole volume as MetaTensor, in memory of its own."""
        whole = self[()]
        return MetaTensor(torch.from_numpy(whole if whole.base is None else whole.copy("K")), meta=dict(self.meta))

    def _read(self, spans: Sequence[slice]) -> np.ndarray:
        """Stored numbers of a channel-first box, channels first."""
        channels, *spatial = spans
        if self._channel_axis is None:
            added: np.ndarray = self._stored[tuple(spatial)][None][channels]
            return added
        if self._channel_axis == 0:
            return self._stored[tuple(spans)]
        spatial.insert(self._channel_axis, channels)
        return np.moveaxis(self._stored[tuple(spatial)], self._channel_axis, 0)


def _span(entry: Any, n: int) -> tuple[slice, Any]:
    """The part of an axis that an index needs, and what is left to do with that part."""
    if isinstance(entry, slice):
        wanted = range(n)[entry]
        if not wanted:
            return slice(0, 0), slice(None)
        low, high = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1]) + 1
        if wanted.step == 1:
            return slice(low, high), slice(None)
        return slice(low, high), slice(None, None, wanted.step)
    if isinstance(entry, (int, np.integer)):
        if not -n <= entry < n:
            raise IndexError(f"index {entry} is out of range for an axis of {n}")
        place = int(entry) % n
        return slice(place, place + 1), 0
    raise TypeError(f"a volume that is read lazily is indexed by ints and slices, got {entry!r}")
