# SPDX-License-Identifier: Apache-2.0
"""The shape that a volume will have when it reaches a transform, told without loading it."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from typing import Any

import nibabel as nib
import torch
from monai.data import MetaTensor
from monai.transforms import (
    CastToTyped,
    ConcatItemsd,
    CopyItemsd,
    DeleteItemsd,
    EnsureChannelFirstd,
    EnsureTyped,
    Identityd,
    LazyTransform,
    LoadImaged,
    MapTransform,
    RandFlipd,
    SelectItemsd,
    ToTensord,
)
from monai.transforms.traits import RandomizableTrait
from nibabel.filebasedimages import ImageFileError

from ..io.zarr_arrays import is_zarr, open_zarr

__all__ = ["spatial_shape"]

_KEEP_SHAPE = (
    CastToTyped,
    ConcatItemsd,
    CopyItemsd,
    DeleteItemsd,
    EnsureChannelFirstd,
    EnsureTyped,
    Identityd,
    LoadImaged,
    RandFlipd,
    SelectItemsd,
    ToTensord,
)


def spatial_shape(value: Any, before: Sequence[Any], key: Hashable = "image") -> tuple[int, ...]:
    """Spatial shape of a volume after the transforms ``before``.

    Args:
        value: what the volume's record holds: a file (NIfTI, or a Zarr store that says what its axes are; metadata are
            read), a list of files that are stacked as channels, or a channel-first array.
        before: transforms that it goes through: those that keep shapes, and those that MONAI can apply lazily.
        key: the volume's key.

    Raises:
        ValueError: a transform after which the shape cannot be told, or something that is neither file nor array.

    Example:
        >>> import numpy as np
        >>> from monai.transforms import Spacingd
        >>> spatial_shape(np.zeros((1, 8, 9, 10)), [EnsureTyped("image"), Spacingd("image", (2, 1, 1))])
        (4, 9, 10)
    """
    for transform in before:
        if not _keeps_shape(transform) and not _tells_shape(transform):
            raise ValueError(f"the shape after {type(transform).__name__} cannot be told without running it")
    affine = None
    if isinstance(value, (list, tuple)) and value:
        value = value[0]  # files that are stacked as channels
    if isinstance(value, (str, os.PathLike)):
        try:
            shape, affine = _of_file(os.fspath(value))
        except (ImageFileError, OSError) as error:
            raise ValueError(f"the shape of {os.fspath(value)} cannot be read from its header ({error})") from error
    elif hasattr(value, "shape"):
        shape, affine = tuple(map(int, value.shape[1:])), getattr(value, "affine", None)
    else:
        raise ValueError(f"a {type(value).__name__} shows no shape")
    # One voxel in memory stands for all: lazy transforms do no more than note what is to be done.
    volume = MetaTensor(torch.zeros(1).expand(1, *shape), affine=affine)
    for transform in before:
        if _tells_shape(transform) and key in transform.keys:
            try:
                volume = transform(dict.fromkeys(transform.keys, volume), lazy=True)[key]
            except Exception as error:  # whatever it says, it says when the volume is loaded too
                raise ValueError(f"the shape after {type(transform).__name__} cannot be told ({error})") from error
    return tuple(int(n) for n in volume.peek_pending_shape())


def _of_file(file: str) -> tuple[tuple[int, ...], torch.Tensor]:
    """Spatial shape and affine of a volume, by its header."""
    if not is_zarr(file):
        image: Any = nib.load(file)
        return tuple(map(int, image.shape[:3])), torch.as_tensor(image.affine)
    volume = open_zarr(file)
    if not volume.named:
        raise ValueError(f"{file!r} does not say which of its axes is that of the channels")
    return volume.stored.shape[volume.layout.has_channels :], torch.as_tensor(volume.layout.affine)


def _keeps_shape(transform: Any) -> bool:
    module = type(transform).__module__
    return isinstance(transform, _KEEP_SHAPE) or module.startswith("monai.transforms.intensity") or _is_index(transform)


def _tells_shape(transform: Any) -> bool:
    return (
        isinstance(transform, LazyTransform)
        and isinstance(transform, MapTransform)
        and not isinstance(transform, RandomizableTrait)
        and not transform.requires_current_data
    )


def _is_index(transform: Any) -> bool:
    return type(transform).__module__.startswith("monai_patchqueue.transforms.index")
