# SPDX-License-Identifier: Apache-2.0
"""MetaTensors whose voxels are read where something needs them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import is_no_channel
from monai.utils import MetaKeys
from torch.utils.data._utils.collate import default_collate_fn_map

from .deferred import Box, Part
from .lazy import LazyVolume
from .lazy_tensor import KINDS, LazyTensor
from .scaling import pieces

__all__ = ["LazyMetaTensor", "fresh_attributes"]

_TOGETHER = 2**20
"""Voxels that are looked at together where all are."""


class LazyMetaTensor(LazyTensor, MetaTensor):
    """A MetaTensor whose voxels are read and computed where something needs them.

    :class:`LoadVolumed` gives it with ``lazy_read=True``. Any transform takes it, and gives what it gives of the loaded
    volume, to the bit. What permutes or flips axes, crops, casts, or does simple arithmetic with fixed numbers reads
    nothing: it is done to the patches that are cut later. All else gets the whole volume, which is then kept.

    It stays one where the operators are: adding, subtracting, multiplying, dividing, clamping, comparing, rounding to
    integers, casting, ``torch.where``; permuting, flipping and rotating by 90 degrees; slicing with or without steps,
    adding and taking out axes of length 1. It is copied (``copy.deepcopy``, ``clone``) without being read. A pickle has
    all of its voxels, as that of a MetaTensor.

    Example:
        >>> import numpy as np
        >>> from monai.transforms import Flip, ScaleIntensityRange
        >>> from monai_patchqueue.io.scaling import Scaling
        >>> volume = LazyMetaTensor.of(LazyVolume(np.arange(6, dtype=np.int16).reshape(2, 3), Scaling()))
        >>> volume = ScaleIntensityRange(0, 5, 0, 1)(Flip(1)(volume))
        >>> volume
        LazyMetaTensor(shape=(1, 2, 3), dtype=torch.float32)
        >>> volume[:, :1].load()
        metatensor([[[0.4000, 0.2000, 0.0000]]])
    """

    @classmethod
    def of(cls, volume: LazyVolume, order: str | None = None) -> LazyMetaTensor:
        """The tensor of a volume.

        Args:
            volume: where its values are read.
            order: of the stored axes in memory, once the values are there: ``"C"`` or ``"F"``; None: as stored.
        """
        dtype = torch.from_numpy(np.empty(0, volume.dtype)).dtype
        like = torch.empty_strided(volume.shape, volume.strides(order), dtype=dtype, device="meta")
        tensor = cls(Part(volume, Box.of(volume.shape)), like)
        tensor.__dict__.update(fresh_attributes(volume.meta, len(volume.shape)))
        return tensor

    def load(self) -> MetaTensor:
        """The values as MetaTensor, in memory of their own; of a part, no more is read than that."""
        return self._described(self.deferred.compute() if self.is_deferred else self.values().clone())

    def normalized(self) -> LazyMetaTensor:
        """The volume with mean 0 and standard deviation 1, in float32, without being held in memory.

        ``NormalizeIntensity`` loads the volume to find them out. Here it is read a few voxels at a time, and the result
        is computed where it is asked for; it may differ in the last bits.

        Raises:
            ValueError: a volume of several channels.
        """
        if self.shape[0] != 1:
            raise ValueError(f"a volume of {self.shape[0]} channels: expected one, as channels differ in their mean")
        strides = self.like.stride()
        axis = max(range(1, self.ndim), key=lambda axis: strides[axis])  # what is read together lies so
        shape = tuple(self.like.shape)
        count, mean, squares = 0, 0.0, 0.0
        for rows in pieces(shape[axis], max(1, _TOGETHER * shape[axis] // math.prod(shape))):
            part = self.as_tensor().narrow(axis, rows.start, rows.stop - rows.start).double()
            difference, total = part.mean().item() - mean, count + part.numel()
            squares += ((part - part.mean()) ** 2).sum().item() + difference**2 * count * part.numel() / total
            mean += difference * part.numel() / total
            count = total
        normalized: Any = (self.float() - mean) / (math.sqrt(squares / count) or 1.0)
        return cast(LazyMetaTensor, normalized)

    def new_empty(self, size: Any, **kwargs: Any) -> MetaTensor:  # type: ignore[override]
        """A MetaTensor without values, as that of a MetaTensor."""
        return MetaTensor(self.as_tensor().new_empty(size, **kwargs))

    def _described(self, values: torch.Tensor) -> MetaTensor:
        described: MetaTensor = values.as_subclass(MetaTensor)
        described.__dict__.update(self.__dict__)
        return described


def fresh_attributes(meta: dict[Any, Any], ndim: int) -> dict[str, Any]:
    """The attributes of a new MetaTensor with these metadata, which are in a dictionary of its own.

    Args:
        meta: the metadata.
        ndim: its number of axes.
    """
    affine = meta.get(MetaKeys.AFFINE)
    if MetaKeys.SPACE not in meta or not isinstance(affine, torch.Tensor) or affine.dtype != torch.float64:
        unusual: dict[str, Any] = vars(MetaTensor(torch.empty((1,) * ndim, device="meta"), meta=dict(meta)))
        return unusual
    no_channel = is_no_channel(meta.get(MetaKeys.ORIGINAL_CHANNEL_DIM, 0))
    attributes = _attributes(ndim, tuple(affine.shape), no_channel)
    return {name: [] if value == [] else value for name, value in attributes.items()} | {"_meta": dict(meta)}


@lru_cache(64)
def _attributes(ndim: int, affine_shape: tuple[int, ...], no_channel: bool) -> dict[str, Any]:
    """Attributes that depend on these alone, as MetaTensor, which takes its time, gives them to itself."""
    channel = {MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan") if no_channel else 0}
    affine = torch.zeros(affine_shape, dtype=torch.float64)
    new = MetaTensor(torch.empty((1,) * ndim, device="meta"), meta={MetaKeys.AFFINE: affine, **channel})
    return {name: value for name, value in vars(new).items() if name != "_meta"}


KINDS[MetaTensor] = KINDS[LazyMetaTensor] = LazyMetaTensor


def _collate(batch: Sequence[Any], *, collate_fn_map: Any = None) -> Any:
    """A batch of parts: torch asks the first tensor for its memory, and so for the whole volume."""
    loaded = [tensor.ordinary() if isinstance(tensor, LazyTensor) else tensor for tensor in batch]
    known = default_collate_fn_map  # MONAI adds MetaTensor when it first collates
    collate = known.get(type(loaded[0]), known[torch.Tensor])
    return collate(loaded, collate_fn_map=collate_fn_map)


default_collate_fn_map[LazyTensor] = default_collate_fn_map[LazyMetaTensor] = _collate
