# SPDX-License-Identifier: Apache-2.0
"""Metadata of patches as rows of bytes, of which batches' metadata are put together as MONAI's collation gives them.

A NIfTI header gives some forty entries. Collating them takes MONAI longer than copying the voxels of a patch does, and
sending each of them to another process costs more than sending all their bytes.
"""

from __future__ import annotations

import itertools
import math
import pickle
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import collate_meta_tensor_fn
from monai.utils import TraceKeys

from ..io.copies import own_copy

__all__ = ["MetaRows"]

_META, _OPERATIONS = "_meta", "_applied_operations"
_PLAIN = {bool: "?", int: "q", float: "d"}
_Attributes = tuple[tuple[str, bool | int | tuple[()]], ...]
"""A MetaTensor's attributes besides metadata and operations; () is for an empty list."""


class _UnusualError(Exception):
    """Metadata of a kind that is left to MONAI's collation."""


class _Number(NamedTuple):
    """Numbers: an array or tensor, or one number, of this type."""

    kind: type
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class _Text(NamedTuple):
    """A string. Those of a batch's patches come in this container."""

    container: type


class _Parts(NamedTuple):
    """A dictionary with these keys, or a sequence of this type."""

    kind: type
    keys: tuple[Any, ...]
    parts: tuple[Any, ...]


@dataclass(frozen=True)
class _Layout:
    """What the metadata of a volume's patches consist of: all but the numbers and strings themselves."""

    meta: _Parts
    attributes: _Attributes

    @cached_property
    def _pickled(self) -> bytes:
        return pickle.dumps((self.meta, self.attributes))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled_layout, (self._pickled,)


_layout = lru_cache(maxsize=256)(_Layout)  # nearly all volumes have the same: it is made, and sent, once


@lru_cache(maxsize=256)
def _unpickled_layout(pickled: bytes) -> _Layout:
    return _layout(*pickle.loads(pickled))


@dataclass(frozen=True)
class MetaRows:
    """The metadata of one volume's patches: numbers as bytes, and strings, a row of each for every patch.

    Args:
        layout: what they are the numbers and strings of.
        numbers: per patch.
        texts: per patch.
        operations: per patch, the applied operations.

    Example:
        >>> patches = [vars(MetaTensor(torch.zeros(1, 8, 8), meta={"name": "a", "index": i})) for i in range(3)]
        >>> rows = MetaRows.of(patches)
        >>> rows.attributes(2)["_meta"]["index"]
        2
        >>> MetaRows.joined([(rows, 2), (rows, 0)], ndim=3)["_meta"]["index"]
        tensor([2, 0])
    """

    layout: _Layout
    numbers: Sequence[bytes]
    texts: Sequence[tuple[str, ...]]
    operations: Sequence[list[Any]]

    @classmethod
    def of(cls, patches: Sequence[Mapping[str, Any]]) -> MetaRows | None:
        """The rows; ``None`` for metadata of an unusual kind, and for such as MONAI's collation refuses.

        Args:
            patches: the attributes of the patches' MetaTensors.
        """
        try:
            attributes = [_attributes(patch) for patch in patches]
            if any(other != attributes[0] for other in attributes):
                return None
            meta, numbers, texts = _taken_apart([patch[_META] for patch in patches])
        except (_UnusualError, KeyError, TypeError, RuntimeError, struct.error):
            return None
        return cls(_layout(meta, attributes[0]), numbers, texts, [patch[_OPERATIONS] for patch in patches])

    def attributes(self, patch: int) -> dict[str, Any]:
        """The attributes of a patch's MetaTensor as they were, in memory of their own."""
        rest: dict[str, Any] = {name: [] if value == () else value for name, value in self.layout.attributes}
        meta = _Reader(self.numbers[patch], self.texts[patch]).next(self.layout.meta)
        return {**rest, _META: meta, _OPERATIONS: own_copy(self.operations[patch])}

    @staticmethod
    def joined(patches: Sequence[tuple[MetaRows, int]], ndim: int) -> dict[str, Any] | None:
        """The attributes of a batch; ``None`` where volumes differ in the kinds of what they have.

        Args:
            patches: for each patch its volume's rows, and its number.
            ndim: number of axes of a patch.
        """
        layout = patches[0][0].layout
        if any(rows.layout is not layout and rows.layout != layout for rows, _ in patches):
            return None
        plan = _plan(layout, len(patches))
        rows = np.frombuffer(b"".join([rows.numbers[number] for rows, number in patches]), np.uint8)
        leaves: list[Any] = []
        for places, dtype, sizes in plan.groups:
            leaves += torch.from_numpy(rows.take(places).view(dtype)).split_with_sizes(sizes)
        for leaf, shape in plan.shapes:
            leaves[leaf] = leaves[leaf].view(shape)
        texts = zip(*[rows.texts[number] for rows, number in patches], strict=True)
        leaves += [container(strings) for container, strings in zip(plan.containers, texts, strict=True)]
        operations = [own_copy(rows.operations[number]) or TraceKeys.NONE for rows, number in patches]
        meta = _put_together(plan.tree, leaves)
        return {**_batch_attributes(layout.attributes, ndim), _META: meta, _OPERATIONS: operations}


def _attributes(patch: Mapping[str, Any]) -> _Attributes:
    rest = [(name, value) for name, value in patch.items() if name not in (_META, _OPERATIONS)]
    if any(value != [] and type(value) not in (bool, int) for _, value in rest):
        raise _UnusualError  # pending operations, for instance
    return tuple((name, () if value == [] else value) for name, value in rest)


@lru_cache(maxsize=64)
def _collated_attributes(attributes: _Attributes, ndim: int) -> dict[str, Any]:
    tiny = torch.empty((1,) * ndim).as_subclass(MetaTensor)
    tiny.__dict__.update({name: [] if value == () else value for name, value in attributes}, _meta={"": 0})
    tiny.__dict__[_OPERATIONS] = []
    collated = vars(collate_meta_tensor_fn([tiny]))
    return {name: value for name, value in collated.items() if name not in (_META, _OPERATIONS)}


def _batch_attributes(attributes: _Attributes, ndim: int) -> dict[str, Any]:
    """What MONAI's collation makes of attributes, besides metadata and operations."""
    return {name: own_copy(value) for name, value in _collated_attributes(attributes, ndim).items()}


def _taken_apart(metas: Sequence[dict[Any, Any]]) -> tuple[_Parts, list[bytes], list[tuple[str, ...]]]:
    """What metadata consist of, and each patch's numbers and strings."""
    first = metas[0]
    if any(type(meta) is not dict or meta.keys() != first.keys() for meta in metas) or not first:
        raise _UnusualError
    parts: list[Any] = []
    numbers: list[list[bytes]] = [[] for _ in metas]
    texts: list[list[str]] = [[] for _ in metas]
    shared: list[bytes] = []  # of entries one after the other, since the last that patches do not share
    for key, value in first.items():
        if all(meta[key] is value for meta in metas):
            strings: list[str] = []
            parts.append(_take(value, shared, strings))
            for text in texts:
                text += strings
            continue
        together = b"".join(shared)
        shared.clear()
        kinds = []
        for meta, number, text in zip(metas, numbers, texts, strict=True):
            number.append(together)
            kinds.append(_take(meta[key], number, text))
        if any(kind != kinds[0] for kind in kinds):
            raise _UnusualError
        parts.append(kinds[0])
    node = _Parts(dict, tuple(first), tuple(parts))
    return node, [b"".join([*number, *shared]) for number in numbers], [tuple(text) for text in texts]


def _take(value: Any, numbers: list[bytes], texts: list[str], container: type = list) -> Any:
    """Take a value's numbers and strings; what it is of them."""
    kind = type(value)
    if kind is torch.Tensor:
        value = value.numpy()
    if kind is np.ndarray or kind is torch.Tensor:
        _torch_dtype(value.dtype)
        numbers.append(value.tobytes())
        return _Number(kind, value.dtype, value.shape)
    if kind in _PLAIN:
        numbers.append(struct.pack(_PLAIN[kind], value))
        return _Number(kind, np.dtype(_PLAIN[kind]), ())
    if isinstance(value, str):
        texts.append(value)
        return _Text(container)
    if kind is tuple and all(type(part) is int for part in value):
        numbers.append(struct.pack(f"{len(value)}q", *value))
        return _whole_numbers(len(value))
    if kind is tuple or kind is list:
        return _Parts(kind, (), tuple([_take(part, numbers, texts, tuple) for part in value]))
    if kind is dict:
        return _Parts(kind, tuple(value), tuple([_take(part, numbers, texts) for part in value.values()]))
    if isinstance(value, np.generic) and _collates_as(value.dtype) == _torch_dtype(value.dtype):
        numbers.append(value.tobytes())
        return _Number(kind, value.dtype, ())
    raise _UnusualError


@lru_cache(maxsize=64)
def _whole_numbers(count: int) -> _Parts:
    """A tuple of ints, as patches' places are."""
    return _Parts(tuple, (), (_Number(int, np.dtype(_PLAIN[int]), ()),) * count)


@lru_cache(maxsize=64)
def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    if dtype.kind not in "biuf" or not dtype.isnative:
        raise _UnusualError
    return torch.from_numpy(np.empty(0, dtype)).dtype


@lru_cache(maxsize=64)
def _collates_as(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.as_tensor([dtype.type()]).dtype


class _Reader:
    """Makes values of their numbers and strings, one after the other."""

    def __init__(self, numbers: bytes, texts: tuple[str, ...]) -> None:
        self._numbers = numbers
        self._texts = iter(texts)
        self._offset = 0

    def next(self, node: Any) -> Any:
        """The next value, which is what ``node`` says."""
        if isinstance(node, _Text):
            return next(self._texts)
        if isinstance(node, _Parts):
            values = [self.next(part) for part in node.parts]
            return dict(zip(node.keys, values, strict=True)) if node.kind is dict else node.kind(values)
        count = math.prod(node.shape)
        read = np.frombuffer(self._numbers, node.dtype, count, self._offset)
        self._offset += read.nbytes
        if node.kind is np.ndarray or node.kind is torch.Tensor:
            array = read.reshape(node.shape).copy()
            return torch.from_numpy(array) if node.kind is torch.Tensor else array
        return read[0] if issubclass(node.kind, np.generic) else read[0].item()


class _Plan(NamedTuple):
    """How the metadata of a batch are put together."""

    groups: list[tuple[np.ndarray[Any, Any], np.dtype[Any], list[int]]]
    """Per dtype: where to find its leaves' bytes in rows one after the other, and how many numbers each leaf has.

    Each has memory of its own, as torch does not save tensors of several dtypes that share it.
    """
    shapes: list[tuple[int, tuple[int, ...]]]
    """The shapes of leaves that have more than one axis in the batch."""
    containers: list[type]
    """What strings come in, which are leaves too, after the numbers."""
    tree: Any
    """Dictionaries and lists of leaves."""


@lru_cache(maxsize=64)
def _plan(layout: _Layout, patches: int) -> _Plan:
    numbers: list[_Number] = []
    containers: list[type] = []
    _find_leaves(layout.meta, numbers, containers)
    sizes = [math.prod(number.shape) * number.dtype.itemsize for number in numbers]
    ends = list(accumulate(sizes))
    rows = np.arange(patches * sum(sizes)).reshape(patches, sum(sizes))
    order = sorted(range(len(numbers)), key=lambda i: numbers[i].dtype.str)
    groups = []
    for dtype, members in groupby(order, key=lambda i: numbers[i].dtype):
        same = list(members)
        places = [rows[:, ends[i] - sizes[i] : ends[i]].reshape(-1) for i in same]
        groups.append((np.concatenate(places), dtype, [patches * math.prod(numbers[i].shape) for i in same]))
    shapes = [(leaf, (patches, *numbers[i].shape)) for leaf, i in enumerate(order) if numbers[i].shape]
    number_leaves = (order.index(i) for i in range(len(order)))
    text_leaves = itertools.count(len(order))
    tree = _tree(layout.meta, number_leaves, text_leaves)
    # MONAI's collation goes through a set of the keys.
    in_order = set.intersection(*(set(layout.meta.keys) for _ in range(patches)))
    tree = {key: tree[key] for key in in_order}
    return _Plan(groups, shapes, containers, tree)


def _find_leaves(node: Any, numbers: list[_Number], containers: list[type]) -> None:
    if isinstance(node, _Number):
        numbers.append(node)
    elif isinstance(node, _Text):
        containers.append(node.container)
    else:
        for part in node.parts:
            _find_leaves(part, numbers, containers)


def _tree(node: Any, number_leaves: Iterator[int], text_leaves: Iterator[int]) -> Any:
    if isinstance(node, _Number):
        return next(number_leaves)
    if isinstance(node, _Text):
        return next(text_leaves)
    parts = [_tree(part, number_leaves, text_leaves) for part in node.parts]
    return dict(zip(node.keys, parts, strict=True)) if node.kind is dict else parts


def _put_together(tree: Any, leaves: Sequence[Any]) -> Any:
    if tree.__class__ is dict:
        # Most entries are leaves, for which a call is saved.
        return {
            key: leaves[part] if part.__class__ is int else _put_together(part, leaves) for key, part in tree.items()
        }
    return [leaves[part] if part.__class__ is int else _put_together(part, leaves) for part in tree]
