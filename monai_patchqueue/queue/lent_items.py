# SPDX-License-Identifier: Apache-2.0
"""Items of a ``CacheDataset`` without a deep copy at each access.

MONAI copies a cached item whole before its random transforms, as these may write into it. Where the first of them is a
crop that only reads, and gives slices, the item can be lent to it instead: all objects are copied, but not what the
volumes hold. Of these, what the slices show is copied afterwards, so that whatever comes next writes into a copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose
from monai.transforms.traits import RandomizableTrait
from monai.transforms.transform import Transform

from ..io.copies import deep_copy
from ..io.lazy_tensor import LazyTensor

__all__ = ["lending"]

# Smaller arrays are copied, as all other objects are.
_LARGE = 4096
# By name, as statistics put subclasses of the same name in the transforms' place. A subclass of anybody else's, under
# a name of its own, may do anything.
_MONAI_CROPS = frozenset(
    f"monai.transforms.croppad.dictionary.{name}"
    for name in (
        "RandCropByLabelClassesd",
        "RandCropByPosNegLabeld",
        "RandScaleCropd",
        "RandSpatialCropSamplesd",
        "RandSpatialCropd",
        "RandWeightedCropd",
    )
)
# Adds to a negative weight map in place, where patches are of one voxel: the map is copied.
_SHIFTS_ITS_MAP = "monai.transforms.croppad.dictionary.RandWeightedCropd"
_OUR_CROPS = frozenset(
    f"monai_patchqueue.transforms.dictionary.{name}"
    for name in ("RandLabelPatchd", "RandUniformPatchd", "RandWeightedPatchd")
)


@contextmanager
def lending(datasets: Sequence[CacheDataset], last: Any = None) -> Iterator[None]:
    """Let these datasets lend cached items instead of copying them, within the block.

    Patches that the transform ``last`` gives may be slices of what was lent.
    """
    classes: list[Any] = [type(dataset) for dataset in datasets]
    try:
        for dataset, cls in zip(datasets, classes, strict=True):
            dataset.__class__ = _lending_class(cls, None if last is None else id(last))
        yield
    finally:
        for dataset, cls in zip(datasets, classes, strict=True):
            dataset.__class__ = cls


@cache
def _lending_class(cls: Any, last: int | None) -> Any:
    if getattr(cls, "_transform", None) is not CacheDataset._transform:
        return cls  # it has ways of its own

    def transform(self: Any, index: int) -> Any:
        item, compose = _cached_item(self, index), self.transform
        first = _first_random(compose)
        if first is None or not _is_transparent(item) or not _only_reads(compose, compose.transforms[first]):
            return CacheDataset._transform(self, index)
        crop = compose.transforms[first]
        loan = _Loan(item, withheld=crop.w_key if _name(crop) == _SHIFTS_ITS_MAP else None)
        patches = compose(loan.item, start=first, end=first + 1)
        if id(crop) == last:
            return patches
        patches = loan.separate(patches)
        return compose(patches, start=first + 1)

    return type(cls.__name__, (cls,), {"_transform": transform, "__module__": cls.__module__})


def _cached_item(dataset: Any, index: int) -> Any:
    """The item that the dataset would copy; ``None`` where it would do anything else."""
    cached = dataset._cache
    if dataset.copy_cache is not True or type(cached) is not list:
        return None
    place = index
    if dataset.hash_as_key:
        key, keys = dataset.hash_func(dataset.data[index]), dataset._hash_keys
        place = keys.index(key) if key in keys else -1
    return cached[place] if 0 <= place < len(cached) else None


def _first_random(compose: Any) -> int | None:
    if type(compose) is not Compose:
        return None
    first: int | None = compose.get_index_of_first(
        lambda t: isinstance(t, RandomizableTrait) or not isinstance(t, Transform)
    )
    return first


def _only_reads(compose: Compose, transform: Any) -> bool:
    """Whether a transform takes slices of volumes and changes nothing."""
    lazy = transform.lazy if compose.lazy is None and hasattr(transform, "lazy") else compose.lazy
    if lazy:  # its slices are cut later, by whatever comes next
        return False
    if _name(transform) in _OUR_CROPS:
        return not callable(transform.num_samples)  # which is given the item, and may do anything
    return _name(transform) in _MONAI_CROPS


def _name(transform: Any) -> str:
    return f"{type(transform).__module__}.{type(transform).__name__}"


class _Loan:
    """An item whose large arrays are those of ``item``, and whose other objects are copies.

    Args:
        item: a cached item.
        withheld: a key whose array is copied all the same.
    """

    def __init__(self, item: dict[Any, Any], withheld: Any) -> None:
        self._fresh: dict[int, torch.UntypedStorage | None] = {}  # by the address of the memory that was lent
        self._separated: dict[int, tuple[Any, Any]] = {}  # what came of each object; holds both, so that ids last
        memo: dict[int, Any] = {}
        for key, value in item.items():
            for array in _arrays(value):
                if key != withheld and _is_lendable(array):
                    memo[id(array)] = self._lend(array, memo)
        self.item: dict[Any, Any] = deep_copy(item, memo)

    def _lend(self, value: Any, memo: dict[int, Any]) -> Any:
        if isinstance(value, np.ndarray):
            self._fresh[value.ctypes.data] = None
            return value.view()
        self._fresh[value.untyped_storage().data_ptr()] = None
        alias = value.as_subclass(torch.Tensor).detach().as_subclass(type(value))
        if isinstance(value, MetaTensor):
            alias.__dict__.update(deep_copy(value.__dict__, memo))
        return alias

    def separate(self, value: Any) -> Any:
        """What a transform made of the item, with copies of what lies in lent memory."""
        if id(value) in self._separated:
            return self._separated[id(value)][1]
        result = value
        if isinstance(value, torch.Tensor):
            result = self._separate_tensor(value)
        elif isinstance(value, np.ndarray):
            result = value.copy(order="K") if value.ctypes.data in self._fresh else value
        elif isinstance(value, dict):
            value.update({key: self.separate(part) for key, part in value.items()})
        elif isinstance(value, list):
            value[:] = [self.separate(part) for part in value]
        elif isinstance(value, tuple):
            result = tuple(self.separate(part) for part in value)
        self._separated[id(value)] = value, result
        return result

    def _separate_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the same strides, at the same place of memory of the volume's size.

        Results of later transforms depend on strides in their last bit. Pages that no patch lies on are never touched,
        so that they take neither time nor memory.
        """
        if isinstance(tensor, LazyTensor):
            return tensor  # what is lent lies in memory
        lent = tensor.untyped_storage()
        if lent.data_ptr() not in self._fresh:
            return tensor
        fresh = self._fresh[lent.data_ptr()]
        if fresh is None:
            fresh = self._fresh[lent.data_ptr()] = torch.empty(lent.nbytes(), dtype=torch.uint8).untyped_storage()
        plain = tensor.as_subclass(torch.Tensor)
        result = torch.empty(0, dtype=plain.dtype).set_(fresh, plain.storage_offset(), plain.size(), plain.stride())
        result = result.copy_(plain).as_subclass(type(tensor))
        if isinstance(tensor, MetaTensor):
            result.__dict__.update(tensor.__dict__)
        return result


def _arrays(value: Any) -> Sequence[Any]:
    """A value that is an array, or the parts of one that is a list of arrays, as indices of classes are."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    return parts if all(isinstance(part, (torch.Tensor, np.ndarray)) for part in parts) else ()


def _is_transparent(item: Any) -> bool:
    """Whether all that an item consists of can be seen: an object of somebody else's may refer to its volumes too."""
    return type(item) is dict and all(
        _arrays(value) or _is_plain(value) or type(value).__module__.startswith("monai_patchqueue.")
        for value in item.values()
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (str, bytes, int, float, complex, np.generic, os.PathLike, torch.dtype))


def _is_lendable(value: Any) -> bool:
    if type(value) is np.ndarray:
        return bool(value.nbytes >= _LARGE and value.flags.c_contiguous and not value.dtype.hasobject)
    return (
        type(value) in (torch.Tensor, MetaTensor)
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and not value.requires_grad
        and not value.is_quantized
        and value.untyped_storage().nbytes() >= _LARGE
    )
