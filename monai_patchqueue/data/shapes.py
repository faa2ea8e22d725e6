# SPDX-License-Identifier: Apache-2.0
"""The shape that a volume will have when it reaches a transform, told without loading it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
from monai.transforms import (
    CastToTyped,
    ConcatItemsd,
    CopyItemsd,
    DeleteItemsd,
    EnsureChannelFirstd,
    EnsureTyped,
    Flipd,
    Identityd,
    LoadImaged,
    Orientationd,
    RandFlipd,
    SelectItemsd,
    ToTensord,
)
from nibabel.filebasedimages import ImageFileError

__all__ = ["spatial_shape"]

_KEEP_SHAPE = (
    CastToTyped,
    ConcatItemsd,
    CopyItemsd,
    DeleteItemsd,
    EnsureChannelFirstd,
    EnsureTyped,
    Flipd,
    Identityd,
    LoadImaged,
    RandFlipd,
    SelectItemsd,
    ToTensord,
)


def spatial_shape(value: Any, before: Sequence[Any]) -> tuple[int, ...]:
    """Spatial shape of a volume after the transforms ``before``.

    Args:
        value: what the volume's record holds: a file (NIfTI; its header is read) or a channel-first array.
        before: transforms that it goes through: those that keep shapes, and ``Orientationd``.

    Raises:
        ValueError: a transform after which the shape cannot be told, or something that is neither file nor array.

    Example:
        >>> spatial_shape(np.zeros((1, 8, 9, 10)), [EnsureTyped("image")])
        (8, 9, 10)
    """
    for transform in before:
        if not _keeps_shape(transform) and not isinstance(transform, Orientationd):
            raise ValueError(f"the shape after {type(transform).__name__} cannot be told without running it")
    affine = None
    if isinstance(value, (str, os.PathLike)):
        try:
            image: Any = nib.load(value)
        except (ImageFileError, OSError) as error:
            raise ValueError(f"the shape of {os.fspath(value)} cannot be read from its header ({error})") from error
        shape, affine = tuple(map(int, image.shape[:3])), image.affine
    elif hasattr(value, "shape"):
        shape = tuple(map(int, value.shape[1:]))
    else:
        raise ValueError(f"a {type(value).__name__} shows no shape")
    for transform in before:
        if isinstance(transform, Orientationd):
            if affine is None:
                raise ValueError("the shape after Orientationd cannot be told of an array")
            shape = _oriented(shape, affine, transform.ornt_transform.axcodes)
            affine = None  # a second one would start from another affine
    return shape


def _keeps_shape(transform: Any) -> bool:
    module = type(transform).__module__
    return isinstance(transform, _KEEP_SHAPE) or module.startswith("monai.transforms.intensity") or _is_index(transform)


def _is_index(transform: Any) -> bool:
    return type(transform).__module__.startswith("monai_patchqueue.transforms.index")


def _oriented(shape: tuple[int, ...], affine: Any, axcodes: Any) -> tuple[int, ...]:
    if axcodes is None:
        raise ValueError("the shape after Orientationd(as_closest_canonical=True) cannot be told")
    orientations = nib.orientations
    change = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(axcodes))
    result = np.zeros(len(shape), int)
    for axis, place in enumerate(change[: len(shape), 0].astype(int)):
        result[place] = shape[axis]
    return tuple(result.tolist())
