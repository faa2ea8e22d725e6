# SPDX-License-Identifier: Apache-2.0
"""Tensors without memory: their values are read and computed where something needs them."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch.utils._pytree import tree_map_only

from .deferred import Box, Deferred, Part, Voxelwise
from .layout import laid_out
from .lazy import LazyVolume
from .memory import Memory
from .operators import CASTS, COPIES, SHAPE_ONLY, VIEWS, VOXELWISE, same_bits_everywhere

__all__ = ["KINDS", "LazyTensor"]

MOST_STEPS = 64
"""More than these are not put off: each is repeated for each patch, and those of shared values for each use."""

_POINTERS = frozenset(
    getattr(torch.Tensor, name)
    for name in ("__array__", "__dlpack__", "data_ptr", "new", "numpy", "storage", "tolist", "untyped_storage")
)
"""Methods that go to a tensor's memory, which no operator shows."""


class LazyTensor(torch.Tensor):
    """A tensor whose values are computed where they are needed.

    Operators that take voxels in another order, leave some out, or do something to each voxel by itself give tensors
    like it. All others get the values, and give what they give of any tensor.

    Args:
        deferred: what the values are computed from.
        like: a tensor of the same shape, strides, place in memory and dtype, on the device "meta".
        memory: of the tensor that this one is a view of; None for new memory.
    """

    __slots__ = ("_memory", "_part", "deferred", "like")

    _memory: Memory
    _part: torch.Tensor | None
    deferred: Deferred
    like: torch.Tensor

    # As those of any tensor, but without the detour by which torch asks subclasses.
    shape = property(lambda self: self.like.shape)
    ndim = property(lambda self: self.like.ndim)
    dtype = property(lambda self: self.like.dtype)
    layout = property(lambda self: self.like.layout)

    def __new__(cls, deferred: Deferred, like: torch.Tensor, memory: Memory | None = None) -> LazyTensor:
        """A tensor without memory, or with that of another one."""
        self: LazyTensor = torch.Tensor._make_wrapper_subclass(
            cls, like.size(), strides=like.stride(), storage_offset=like.storage_offset(), dtype=like.dtype
        )
        self._memory = Memory(deferred, like) if memory is None else memory
        self._part = None
        self.deferred = deferred
        self.like = like
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing is left to do; MetaTensor would make metadata."""

    @property
    def is_deferred(self) -> bool:
        """Whether the values have not been computed yet."""
        return self._part is None and self._memory.filled is None

    def values(self, shared: bool = False) -> torch.Tensor:
        """The values, as an ordinary tensor that is not to be written to.

        Args:
            shared: give the memory that is shared with all views, which may be written to.
        """
        memory = self._memory
        if memory.filled is None and not shared and self.like.numel() < memory.numel():
            if self._part is None:
                self._part = self.deferred.compute()
            return self._part
        return memory.fill().as_strided(self.like.size(), self.like.stride(), self.like.storage_offset())

    def as_subclass(self, cls: type[Any]) -> Any:
        """A view of another class; see ``torch.Tensor.as_subclass``."""
        kind = KINDS.get(cls)
        if kind is None:
            return self.values(shared=True).as_subclass(cls)
        return kind(self.deferred, self.like, self._memory)

    @property
    def data(self) -> Any:
        """A view, as of any tensor; other memory than its own cannot be given to it."""
        return self.detach()

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        raise RuntimeError(f"{self!r} cannot be given other data: take a copy by load() before, or copy_() into it")

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory that is shared with all views; for torch's own methods, which ask for it behind operators."""
        return self.values(shared=True).untyped_storage()

    def ordinary(self) -> torch.Tensor:
        """The values, as MetaTensor where this is one; not to be written to."""
        return self._described(self.values())

    def _described(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def numbers(self) -> np.ndarray:
        """The values, in a smaller dtype if the file has them in one, in the tensor's order of axes in memory.

        They are not to be written to.
        """
        stored = self.deferred.stored() if self.is_deferred else None
        if stored is None:
            values = self.values()
            return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        return laid_out(stored, self.like.stride())

    def untouched(self) -> LazyVolume | None:
        """The volume that has the very same voxels; None if something was done to them."""
        part = self.deferred if self.is_deferred else None
        return part.volume if isinstance(part, Part) and part.box == Box.of(part.volume.shape) else None

    def source(self) -> Hashable:
        """What tells :meth:`numbers` from any others, their order in memory included; None where it is not known."""
        source = self.deferred.source() if self.is_deferred else None
        return None if source is None else (source, self.like.stride())

    def part(self, index: tuple[slice, ...]) -> torch.Tensor:
        """Values in memory of their own, which may have another order of axes.

        Args:
            index: a slice without a step for each axis.
        """
        return self.deferred.seen(lambda box: box.crop(index)).compute()

    def deferred_parts(self, starts: Sequence[Sequence[int]], shape: Sequence[int]) -> list[Any]:
        """Like :meth:`part`, but not computed yet; they have the class and the order of axes of this tensor.

        Args:
            starts: where they begin, along each axis.
            shape: theirs.
        """
        like = _dense(tuple(shape), self.like.stride(), self.like.dtype)
        first = self.deferred.seen(lambda box: box.crop([slice(0, n) for n in shape]))
        return [type(self)(first.seen(partial(Box.moved, by=start)), like) for start in starts]

    def unread(self) -> Part | None:
        """The part of a volume whose values these are; None if it was read already, or something is done to them."""
        return self.deferred if self.is_deferred and isinstance(self.deferred, Part) else None

    def __copy__(self) -> LazyTensor:
        view = type(self)(self.deferred, self.like, self._memory)
        view.__dict__.update(self.__dict__)
        return view

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            values = None if self.is_deferred else self.values().clone()
            copied = type(self)(self.deferred, self.like.clone()) if values is None else self._described(values)
            copied.__dict__ = copy.deepcopy(self.__dict__, memo)
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.ordinary().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.like.shape)}, dtype={self.like.dtype})"

    __str__ = __repr__

    def __format__(self, format_spec: str) -> str:
        return format(str(self), format_spec)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _POINTERS:
            args, kwargs = _with_values((args, kwargs), shared=True)
        if any(issubclass(t, MetaTensor) for t in types):
            return MetaTensor.__torch_function__.__func__(MetaTensor, func, (MetaTensor,), args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        deferred = _defer(func, args, kwargs)
        return _at_once(func, args, kwargs) if deferred is None else deferred


@lru_cache(64)
def _dense(shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the device "meta" whose axes lie in memory in the order that strides say, without gaps."""
    strides, step = [0] * len(shape), 1  # spelled out, as torch computes them in Python
    for axis in sorted(range(len(shape)), key=lambda axis: (order[axis], -axis)):
        strides[axis], step = step, step * shape[axis]
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


KINDS: dict[type, type[LazyTensor]] = {torch.Tensor: LazyTensor, LazyTensor: LazyTensor}
"""The lazy version of each class of tensors that has one."""


def _defer(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any | None:
    """What an operator gives, without any value computed; None if it does not commute with cutting."""
    if func in VOXELWISE:
        return _defer_voxelwise(func, args, kwargs)
    tensor = args[0] if args else None
    if not isinstance(tensor, LazyTensor) or not tensor.is_deferred:
        return None
    if func in CASTS:
        return _defer_cast(tensor, func, **kwargs)
    if func not in VIEWS and func not in COPIES:
        return None
    memory, meanings = (tensor._memory, VIEWS) if func in VIEWS else (None, COPIES)
    options = {name: option for name, option in kwargs.items() if name != "memory_format"}
    changes = meanings[func](tuple(tensor.like.shape), *args[1:], **options)
    if changes is None:
        return None
    likes = func(tensor.like, *args[1:], **kwargs)
    if not isinstance(changes, list):
        return type(tensor)(tensor.deferred.seen(changes), likes, memory)
    pairs = zip(changes, likes, strict=True)
    return [type(tensor)(tensor.deferred.seen(change), like, memory) for change, like in pairs]


def _defer_cast(
    tensor: LazyTensor,
    func: Any,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | str | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> LazyTensor | None:
    dtype = tensor.like.dtype if dtype is None else dtype
    elsewhere = torch.device(device or "cpu").type != "cpu" or layout not in (None, torch.strided) or pin_memory
    if elsewhere or dtype.is_complex or tensor.deferred.steps >= MOST_STEPS:
        return None
    like = func(tensor.like, dtype=dtype, memory_format=memory_format)
    return type(tensor)(Voxelwise(torch.Tensor.to, (tensor.deferred, dtype), cast=dtype), like)


def _defer_voxelwise(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LazyTensor | None:
    tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)]
    lazy = [tensor for tensor in args if isinstance(tensor, LazyTensor)]
    if not all(tensor.is_deferred if isinstance(tensor, LazyTensor) else _is_number(tensor) for tensor in tensors):
        return None
    if len({tensor.like.shape for tensor in lazy}) != 1 or sum(t.deferred.steps for t in lazy) >= MOST_STEPS:
        return None
    constants = [
        _kept(arg) if isinstance(arg, torch.Tensor) and not isinstance(arg, LazyTensor) else arg for arg in args
    ]
    single = [torch.ones(1, dtype=arg.like.dtype) if isinstance(arg, LazyTensor) else arg for arg in constants]
    dtype = func(*single, **kwargs).dtype
    if not same_bits_everywhere([dtype, *(tensor.dtype for tensor in tensors)], kwargs):
        return None
    like = torch.empty_like(lazy[0].like, dtype=dtype)  # by the operator itself torch would import its compiler
    kind = KINDS[MetaTensor if any(isinstance(tensor, MetaTensor) for tensor in tensors) else torch.Tensor]
    deferred = tuple(arg.deferred if isinstance(arg, LazyTensor) else arg for arg in constants)
    return kind(Voxelwise(func, deferred, kwargs), like)


def _is_number(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 0 and tensor.device.type == "cpu"


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that nobody else can write to."""
    return tensor.detach().as_subclass(torch.Tensor).clone()


def _at_once(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What an operator gives of the values."""
    if func in SHAPE_ONLY:
        like = args[0].like
        return func(torch.empty_strided(like.size(), like.stride(), dtype=like.dtype), *args[1:], **kwargs)
    parameters = func._schema.arguments
    shared = {parameter.name for parameter in parameters if parameter.alias_info is not None}
    names = [parameter.name for parameter in parameters][: len(args)]
    given = {**dict(zip(names, args, strict=True)), **kwargs}
    real = {name: _with_values(value, name in shared) for name, value in given.items()}
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*[real[name] for name in names], **{name: real[name] for name in kwargs})
    if not func._schema.is_mutable:
        return result
    written = [(given[name], real[name]) for name in shared if isinstance(given.get(name), LazyTensor)]
    for lazy, filled in written:
        if (filled.shape, filled.stride()) != (lazy.like.shape, lazy.like.stride()):
            raise RuntimeError(f"{func} would change the shape of a tensor in place; take a copy by load() before")
    given_back = {id(filled): lazy for lazy, filled in written}
    return tree_map_only(torch.Tensor, lambda tensor: given_back.get(id(tensor), tensor), result)


def _with_values(value: Any, shared: bool) -> Any:
    return tree_map_only(LazyTensor, lambda tensor: tensor.values(shared), value)
