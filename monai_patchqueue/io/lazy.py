# SPDX-License-Identifier: Apache-2.0
"""Volumes of which the parts that are asked for are read and converted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import MetaKeys

from .chunks import ChunkedFile
from .regions import StoredFile
from .reoriented import ReorientedArray
from .scaling import Scaling, pieces
from .zarr_arrays import ZarrArray

__all__ = ["LazyVolume"]

# Voxels that are looked at together where all are.
_TOGETHER = 2**20


class LazyVolume:
    """A channel-first volume that is read and converted where it is cut.

    The patch transforms of this package take it in the place of an array, and give the patches that they would give of
    the whole volume. It has none of a tensor's operations: other transforms go after the patches are cut, where their
    work is smaller too. :meth:`load` gives the whole volume.

    Args:
        stored: the stored numbers: an array, or anything with ``shape``, ``dtype`` and ``__getitem__`` that is given
            one slice for each axis.
        scaling: from stored numbers to intensities.
        meta: metadata, with the ``affine``.
        channel_axis: the axis of ``stored`` that has the channels; None if there is none, and one is to be added.

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
        stored: np.ndarray | StoredFile | ChunkedFile | ReorientedArray | ZarrArray,
        scaling: Scaling,
        meta: dict[Any, Any] | None = None,
        channel_axis: int | None = None,
    ) -> None:
        self._stored = stored
        self._scaling = scaling
        self._channel_axis = None if channel_axis is None else range(len(stored.shape))[channel_axis]
        self.meta = {MetaKeys.AFFINE: torch.eye(4, dtype=torch.float64)} if meta is None else meta

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

    @property
    def affine(self) -> torch.Tensor:
        """From voxels to millimetres; float64 of shape [4, 4]."""
        affine: torch.Tensor = self.meta[MetaKeys.AFFINE]
        return affine

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

    def reoriented(self, axcodes: str) -> LazyVolume:
        """The volume with its axes in other directions, as ``Orientation`` gives it; it is read no more than before.

        Args:
            axcodes: where the axes are to point, ``"RAS"`` for instance.

        Raises:
            ValueError: codes of another number of axes, or a volume that is not of three.
        """
        spatial = self.shape[1:]
        if len(spatial) != 3 or len(axcodes) != 3:
            raise ValueError(f"axcodes {axcodes!r} for a volume of shape {list(self.shape)}: expected three axes")
        orientations = nib.orientations
        affine = self.affine.numpy()
        change = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(axcodes))
        axes, backwards = list(range(len(self._stored.shape))), [False] * len(self._stored.shape)
        places = [axis for axis in axes if axis != self._channel_axis]
        for source, (target, direction) in zip(places, change, strict=True):
            axes[places[int(target)]] = source
            backwards[places[int(target)]] = bool(direction < 0)
        turned = torch.as_tensor(affine @ orientations.inv_ornt_aff(change, spatial), dtype=torch.float64)
        meta = {**self.meta, MetaKeys.AFFINE: turned}
        return LazyVolume(ReorientedArray(self._stored, axes, backwards), self._scaling, meta, self._channel_axis)

    def normalized(self) -> LazyVolume:
        """The volume with mean 0 and standard deviation 1, as ``NormalizeIntensity`` gives it, in float32.

        All voxels are read once, a few at a time, to find them out.

        Raises:
            ValueError: a volume of several channels.
        """
        if self.shape[0] != 1:
            raise ValueError(f"a volume of {self.shape[0]} channels: expected one, as channels differ in their mean")
        axis = 1 if self._first_axis_is_slowest() else self.ndim - 1  # what is read together lies together
        count, mean, squares = 0, 0.0, 0.0
        for rows in pieces(self.shape[axis], max(1, _TOGETHER * self.shape[axis] // int(np.prod(self.shape)))):
            index = (*[slice(None)] * axis, rows)
            part = self[index].astype(np.float64)
            difference, total = part.mean() - mean, count + part.size
            squares += ((part - part.mean()) ** 2).sum() + difference**2 * count * part.size / total
            mean += difference * part.size / total
            count = total
        deviation = float(np.sqrt(squares / count)) or 1.0
        slope, inter = self._scaling.slope / deviation, (self._scaling.inter - mean) / deviation
        scaling = Scaling(slope, inter, np.dtype(np.float32))
        return LazyVolume(self._stored, scaling, self.meta, self._channel_axis)

    def _first_axis_is_slowest(self) -> bool:
        if isinstance(self._stored, np.ndarray):
            return not self._stored.flags.f_contiguous
        return getattr(self._stored, "order", "C") == "C"

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
