# SPDX-License-Identifier: Apache-2.0
"""Metadata of batches, as MONAI's collation gives them, put together from rows that are collated once a volume.

Collating the some forty entries that a NIfTI header gives takes MONAI longer than copying the voxels of a patch does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import collate_meta_tensor_fn
from torch.utils.data import default_collate

__all__ = ["MetaRows"]


_OWN = ("_meta", "_applied_operations")
_NUMBERS: dict[type, type] = {bool: np.bool_, int: np.int64, float: np.float64}
_Group = tuple[bool, str]
"""Whether all patches of a volume have the same numbers, and their dtype."""


class _UnusualError(Exception):
    """Metadata of a kind that is left to MONAI's collation."""


class MetaRows:
    """The metadata of one volume's patches, a row of numbers and strings for each.

    Args:
        patches: the attributes of the patches' MetaTensors. Metadata that they have in common are the same objects.
        ndim: number of axes of a patch.

    Example:
        >>> patches = [vars(MetaTensor(torch.zeros(1, 8, 8), meta={"name": "a", "index": i})) for i in range(3)]
        >>> rows = MetaRows.of(patches, 3)
        >>> rows.joined([(rows, 2), (rows, 0)])["index"]
        tensor([2, 0])
    """

    def __init__(self, patches: Sequence[Mapping[str, Any]], ndim: int) -> None:
        rest = [{name: value for name, value in patch.items() if name not in _OWN} for patch in patches]
        if any(other != rest[0] for other in rest[1:]):
            raise _UnusualError
        if any(value != [] and type(value) not in (bool, int) for value in rest[0].values()):
            raise _UnusualError  # pending operations, for instance
        self.attributes = _attributes(
            tuple((name, () if value == [] else value) for name, value in rest[0].items()), ndim
        )
        metas = [patch["_meta"] for patch in patches]
        first = metas[0]
        if not first or any(meta.keys() != first.keys() for meta in metas):
            raise _UnusualError
        shared = {key for key, value in first.items() if all(meta[key] is value for meta in metas)}
        self._leaves: dict[_Group, list[np.ndarray[Any, Any]]] = {}
        self._texts: list[Sequence[str]] = []
        structure = {
            key: self._take(_collated([first[key]] if key in shared else [meta[key] for meta in metas]), key in shared)
            for key in first
        }
        self._numbers = {group: np.concatenate(leaves, axis=1) for group, leaves in self._leaves.items()}
        sizes = {group: tuple(leaf.shape[1] for leaf in leaves) for group, leaves in self._leaves.items()}
        self._leaves.clear()
        self._kind = structure, sizes, self.attributes
        self._keys = tuple(first)

    @classmethod
    def of(cls, patches: Sequence[Mapping[str, Any]], ndim: int) -> MetaRows | None:
        """The rows, or ``None`` for metadata of an unusual kind, and for such as MONAI's collation refuses."""
        try:
            return cls(patches, ndim)
        except (_UnusualError, KeyError, OverflowError, TypeError, ValueError, RuntimeError):
            return None

    def _take(self, value: Any, shared: bool) -> tuple[Any, ...]:
        """Keep a collated value's numbers and strings; how to put them together again."""
        if type(value) is torch.Tensor:
            value = value.numpy()
        if type(value) is np.ndarray and value.ndim:
            group = shared, value.dtype.str
            leaves = self._leaves.setdefault(group, [])
            leaves.append(value.reshape(len(value), -1))
            return "numbers", group, len(leaves) - 1, value.shape[1:]
        if type(value) is dict:
            return "dict", tuple((key, self._take(part, shared)) for key, part in value.items())
        if type(value) in (list, tuple) and value and all(isinstance(part, str) for part in value):
            self._texts.append(value)
            return "texts", type(value), len(self._texts) - 1, shared
        if type(value) is list and value and not any(isinstance(part, str) for part in value):
            return "list", tuple(self._take(part, shared) for part in value)
        raise _UnusualError

    @staticmethod
    def joined(patches: Sequence[tuple[MetaRows, int]]) -> dict[Any, Any] | None:
        """The metadata of a batch; ``None`` where volumes differ in the kinds of what they have.

        Args:
            patches: for each patch its volume's rows, and its number.
        """
        first = patches[0][0]
        if any(rows is not first and rows._kind != first._kind for rows, _ in patches):
            return None
        structure, kinds, _ = first._kind
        numbers = {}
        for group, sizes in kinds.items():
            shared, _ = group
            stacked = np.concatenate([rows._numbers[group][0 if shared else number] for rows, number in patches])
            leaf_by_leaf = stacked.take(_leaf_by_leaf(sizes, len(patches)))
            numbers[group] = torch.from_numpy(leaf_by_leaf).split_with_sizes([size * len(patches) for size in sizes])

        def put_together(how: tuple[Any, ...]) -> Any:
            kind, *what = how
            if kind == "numbers":
                group, leaf, shape = what
                return numbers[group][leaf].view(len(patches), *shape)
            if kind == "texts":
                container, place, shared = what
                return container(rows._texts[place][0 if shared else number] for rows, number in patches)
            if kind == "dict":
                return {key: put_together(part) for key, part in what[0]}
            return [put_together(part) for part in what[0]]

        in_order = set.intersection(*(set(rows._keys) for rows, _ in patches))  # as MONAI has it
        return {key: put_together(structure[key]) for key in in_order}


@lru_cache(maxsize=64)
def _attributes(rest: tuple[tuple[str, bool | int | tuple[()]], ...], ndim: int) -> dict[str, Any]:
    """The attributes of a batch, besides metadata and operations, of MetaTensors that have these; () is for a list."""
    tiny = torch.empty((1,) * ndim).as_subclass(MetaTensor)
    tiny.__dict__.update({name: [] if value == () else value for name, value in rest}, _meta={"": 0})
    tiny.__dict__["_applied_operations"] = []
    collated = vars(collate_meta_tensor_fn([tiny]))
    return {name: value for name, value in collated.items() if name not in _OWN}


def _collated(values: list[Any]) -> Any:
    """One entry's values, as MONAI's collation has them, or, for most kinds, as numpy has: quicker."""
    kind, first = type(values[0]), values[0]
    alike = all(type(value) is kind for value in values)
    if kind is str and alike:
        return values
    if kind in _NUMBERS and alike:
        return np.array(values, dtype=_NUMBERS[kind])
    if kind is np.ndarray and alike and first.dtype.isnative and first.dtype.kind in "biuf":
        if any(value.dtype != first.dtype or value.shape != first.shape for value in values):
            raise _UnusualError
        return np.stack(values)
    return default_collate(values)


@lru_cache(maxsize=256)
def _leaf_by_leaf(sizes: tuple[int, ...], patches: int) -> np.ndarray[Any, Any]:
    """Where to find, in rows one after the other, the numbers of one leaf after the other."""
    places = np.arange(patches * sum(sizes)).reshape(patches, sum(sizes))
    ends = list(accumulate(sizes))
    leaves = [places[:, end - size : end].reshape(-1) for size, end in zip(sizes, ends, strict=True)]
    found: np.ndarray[Any, Any] = np.concatenate(leaves)
    return found
