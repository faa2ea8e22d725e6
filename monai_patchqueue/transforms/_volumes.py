# SPDX-License-Identifier: Apache-2.0
"""Volumes as transforms meet them (arrays, tensors, MetaTensors, lazily read ones): naming, checking, cutting."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms.lazy.functional import apply_pending
from monai.utils import ImageMetaKey, PostFix

from ..io.lazy_tensor import LazyTensor
from ..io.stored import StoredVolume
from ..sampling import PatchGeometry, as_array, resolve_size
from ._kept import UnreadGuide
from ._padding import Fill, read_padded


@dataclass(frozen=True)
class VolumeName:
    """Names a volume for an error message, by its file and its key; put together where there is an error."""

    volume: Any
    key: Hashable
    item: Mapping[Hashable, Any] | None

    def __str__(self) -> str:
        others = list(self.item.values()) if self.item is not None else []
        metas = [getattr(v, "meta", None) for v in (self.volume, *others)]
        if self.item is not None:
            metas += [v for k, v in self.item.items() if isinstance(k, str) and k.endswith(PostFix.meta(""))]
        files = (m.get(ImageMetaKey.FILENAME_OR_OBJ) for m in metas if isinstance(m, Mapping))
        file = next((f for f in files if f is not None and str(f)), None)
        name = "volume without a file name" if file is None else f"volume {str(file)!r}"
        return name if self.key is None else f"{name}, key {self.key!r}"


def describe(volume: Any = None, key: Hashable = None, item: Mapping[Hashable, Any] | None = None) -> VolumeName:
    """Names a volume for an error message: its file and its key."""
    return VolumeName(volume, key, item)


def is_volume(value: Any) -> bool:
    """Whether a value can be cut: it has a shape with a channel and at least one spatial axis, and can be indexed."""
    with torch._C.DisableTorchFunctionSubclass():  # MetaTensor's, by which each look at a shape takes long
        return hasattr(value, "shape") and hasattr(value, "__getitem__") and len(value.shape) >= 2


def spatial_shape(volume: Any) -> tuple[int, ...]:
    """Spatial shape of a channel-first volume, as it will be after its pending operations."""
    if isinstance(volume, MetaTensor) and volume.pending_operations:
        return tuple(int(n) for n in volume.peek_pending_shape())
    with torch._C.DisableTorchFunctionSubclass():
        return tuple(int(n) for n in volume.shape[1:])


def up_to_date(volume: Any) -> Any:
    """The volume after its pending operations; the argument keeps its own."""
    if not isinstance(volume, MetaTensor) or not volume.pending_operations:
        return volume
    pending = list(volume.pending_operations)
    unburdened = volume.as_tensor().as_subclass(MetaTensor)
    unburdened.copy_meta_from(volume)
    unburdened.clear_pending_operations()
    return apply_pending(unburdened, pending=pending)[0]


def fitting_geometry(
    volume: Any, where: object, spatial_size: int | tuple[int, ...], border: str, may_pad: bool
) -> PatchGeometry:
    """The legal patches of a volume.

    Raises:
        TypeError: if the volume is none.
        ValueError: if it has another number of axes than the patch, or is smaller and may not be padded.
    """
    if not is_volume(volume):
        raise TypeError(
            f"{where}: expected a channel-first array or tensor, got {type(volume).__name__}"
            + (f" of shape {list(volume.shape)}" if hasattr(volume, "shape") else "")
            + "; load it (LoadImaged) and add a channel (EnsureChannelFirstd) before patches are taken"
        )
    shape = spatial_shape(volume)
    try:
        size = resolve_size(spatial_size, shape)
    except ValueError as error:
        raise ValueError(
            f"{where}: {error}; volumes are channel-first, add a missing channel with EnsureChannelFirstd"
        ) from None
    if 0 in shape:
        raise ValueError(f"{where}: the volume is empty, its spatial shape is {list(shape)}")
    geometry = PatchGeometry(shape, size, border)
    if not geometry.fits and not may_pad:
        raise ValueError(
            f"{where}: spatial shape {list(shape)} is smaller than the patch {list(size)}; give padding_mode "
            "(for example 'constant') to pad it just enough, choose a smaller spatial_size (-1 takes a whole axis), or "
            "put SpatialPadd before"
        )
    return geometry


REMEDY = (
    'check the data, let every voxel be drawn (border="clamp" or "pad"), or take such patches anywhere '
    '(on_empty="uniform")'
)


def no_center(lacking: str, geometry: PatchGeometry) -> str:
    """Says that there is nothing to draw from."""
    box = " x ".join(f"{a}...{b - 1}" for a, b in geometry.box)
    return (
        f"{lacking} among the legal centers {box} (border={geometry.border!r}, spatial shape {list(geometry.shape)}, "
        f"patch {list(geometry.size)})"
    )


def same_shape(guide: Any, geometry: PatchGeometry, where: object) -> np.ndarray | StoredVolume | UnreadGuide:
    """A weight map or label as array, or as it lies in a store or file, after a check that it is for this volume.

    Raises:
        TypeError: if it is no channel-first array.
        ValueError: if it has another spatial shape than the volume.
    """
    if not is_volume(guide):
        raise TypeError(f"{where}: expected a channel-first array or tensor, got {type(guide).__name__}")
    guide = up_to_date(guide)
    if spatial_shape(guide) != geometry.shape:
        raise ValueError(
            f"{where}: its spatial shape {list(spatial_shape(guide))} is not the volume's {list(geometry.shape)}; it "
            "must be channel-first ([channels, *spatial]) and go through the same spatial transforms"
        )
    stored = guide.untouched() if isinstance(guide, LazyTensor) else guide
    if isinstance(stored, StoredVolume):
        return stored  # whose index reads of it what is needed
    if not isinstance(guide, LazyTensor):
        return as_array(guide)
    source = guide.source()
    return guide.numbers() if source is None else UnreadGuide(guide, source)


def in_memory(volume: torch.Tensor, described: bool) -> torch.Tensor:
    """A tensor without its metadata, and without its laziness if its values have been needed already.

    Args:
        volume: the tensor.
        described: whether parts that are not read yet are to be of its class, for metadata of their own.
    """
    if not isinstance(volume, LazyTensor):
        return volume.as_subclass(torch.Tensor)
    if not volume.is_deferred:
        return volume.values()
    return volume if described else volume.as_subclass(torch.Tensor)


def cut(volume: Any, starts: list[list[int]], geometry: PatchGeometry, fill: Fill, copies: bool = True) -> list[Any]:
    """Patches, in the volume's order of axes in memory.

    Args:
        volume: channel-first; not a MetaTensor, unless it is read lazily.
        starts: the patches' starts in the volume, one int per spatial axis.
        geometry: the volume's and the patches' size.
        fill: what lies outside the volume.
        copies: whether patches are to be read now, and to share no memory with the volume.
    """
    size, shape = geometry.size, geometry.shape
    inside = [all(a >= 0 and a + s <= n for a, s, n in zip(start, size, shape, strict=True)) for start in starts]
    if isinstance(volume, LazyTensor) and not copies and all(inside):
        return volume.deferred_parts([(0, *start) for start in starts], (volume.shape[0], *size))
    patches = []
    for start, is_inside in zip(starts, inside, strict=True):
        if is_inside:
            patch = _read(volume, tuple(slice(a, a + s) for a, s in zip(start, size, strict=True)))
            patches.append(_own(patch) if copies and not isinstance(volume, LazyTensor) else patch)
        else:
            patches.append(_own(read_padded(lambda index: _read(volume, index), shape, start, size, fill)))
    return patches


def _read(volume: Any, index: tuple[slice, ...]) -> Any:
    at = (slice(None), *index)
    part = volume.part(at) if isinstance(volume, LazyTensor) else volume[at]
    return part if isinstance(part, torch.Tensor) else np.asarray(part)


def _own(patch: Any) -> Any:
    if isinstance(patch, torch.Tensor):
        return patch.clone()
    return patch if patch.base is None and type(patch) is np.ndarray else np.array(patch, order="K", subok=False)
