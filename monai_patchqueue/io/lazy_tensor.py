# SPDX-License-Identifier: Apache-2.0
"""Tensors without memory: their values are read and computed where something needs them."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch.utils._pytree import tree_map_only
from torch.utils.data._utils.collate import default_collate_fn_map

from .deferred import Box, Deferred, Part, Voxelwise
from .lazy import LazyVolume
from .operators import CASTS, COPIES, SHAPE_ONLY, VIEWS, VOXELWISE, same_bits_everywhere
from .scaling import pieces

__all__ = ["LazyMetaTensor", "LazyTensor"]

_TOGETHER = 2**20
"""Voxels that are looked at together where all are."""

_POINTERS = frozenset(
    getattr(torch.Tensor, name)
    for name in ("__array__", "__dlpack__", "data_ptr", "new", "numpy", "storage", "tolist", "untyped_storage")
)
"""Methods that go to a tensor's memory, which no operator shows."""


class Memory:
    """What a tensor and its views share: values that are still to be computed, or the memory that has them.

    Args:
        values: of the whole memory.
        like: a tensor of its shape and strides on the device "meta".
    """

    __slots__ = ("_like", "_lock", "_values", "filled")

    def __init__(self, values: Deferred, like: torch.Tensor) -> None:
        self._values = values
        self._like = like
        self._lock = threading.Lock()
        self.filled: torch.Tensor | None = None

    def numel(self) -> int:
        """How many values there are."""
        return self._like.numel()

    def fill(self) -> torch.Tensor:
        """Compute all values, once."""
        with self._lock:
            if self.filled is None:
                values = self._values.compute()
                if _steps(values) != _steps(self._like):
                    values = torch.empty_strided(values.shape, self._like.stride(), dtype=values.dtype).copy_(values)
                self.filled = values
            return self.filled


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

    def __new__(cls, deferred: Deferred, like: torch.Tensor, memory: Memory | None = None) -> LazyTensor:
        self: LazyTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.size(), strides=like.stride(), storage_offset=like.storage_offset(), dtype=like.dtype
        )
        self._memory = Memory(deferred, like) if memory is None else memory
        self._part = None
        self.deferred = deferred
        self.like = like
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

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
        if cls is torch.Tensor:
            return LazyTensor(self.deferred, self.like, self._memory)
        if cls in (MetaTensor, LazyMetaTensor):
            return LazyMetaTensor(self.deferred, self.like, self._memory)
        return self.values(shared=True).as_subclass(cls)

    def ordinary(self) -> torch.Tensor:
        """The values, as MetaTensor where this is one; not to be written to."""
        return self.values()

    def numbers(self) -> np.ndarray:
        """The values, in a smaller dtype if the file has them in one, in the tensor's order of axes in memory.

        They are not to be written to.
        """
        stored = self.deferred.stored() if self.is_deferred else None
        if stored is None:
            values = self.values()
            return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        order = sorted(range(stored.ndim), key=lambda axis: (-self.like.stride(axis), axis))
        laid_out = stored.transpose(order)
        strides = [stride for stride, n in zip(laid_out.strides, laid_out.shape, strict=True) if n > 1]
        if strides != sorted(strides, reverse=True) or any(stride < 0 for stride in strides):
            laid_out = np.ascontiguousarray(laid_out)
        return laid_out.transpose(np.argsort(order))

    def part(self, index: tuple[slice, ...]) -> torch.Tensor:
        """Values in memory of their own, which may have another order of axes.

        Args:
            index: a slice without a step for each axis.
        """
        return self.deferred.seen(lambda box: box.crop(index)).compute()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            known = self.is_deferred
            copied = type(self)(self.deferred, self.like.clone()) if known else self.ordinary().clone()
            copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.ordinary().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.like.shape)}, dtype={self.like.dtype})"

    __str__ = __repr__

    def __format__(self, format_spec: str) -> str:
        return format(str(self), format_spec)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _POINTERS:
            args, kwargs = _with_values(args, kwargs, shared=True)
        if any(issubclass(t, MetaTensor) for t in types):
            return MetaTensor.__torch_function__.__func__(MetaTensor, func, (MetaTensor,), args, kwargs)  # type: ignore[attr-defined]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        deferred = _defer(func, args, kwargs)
        return _at_once(func, args, kwargs) if deferred is None else deferred


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
        MetaTensor.__init__(tensor, like, meta=volume.meta)
        return tensor

    def load(self) -> MetaTensor:
        """The values as MetaTensor, in memory of their own; of a part, no more is read than that."""
        values = self.deferred.compute() if self.is_deferred else self.values().clone()
        return self._described(values)

    def normalized(self) -> LazyMetaTensor:
        """The volume with mean 0 and standard deviation 1, in float32, without being held in memory.

        ``NormalizeIntensity`` loads the volume to find them out. Here it is read a few voxels at a time, and the result
        is computed where it is asked for; it may differ in the last bits.

        Raises:
            ValueError: a volume of several channels.
        """
        if self.shape[0] != 1:
            raise ValueError(f"a volume of {self.shape[0]} channels: expected one, as channels differ in their mean")
        axis = max(range(1, self.ndim), key=lambda axis: abs(self.like.stride(axis)))  # what is read together lies so
        shape = tuple(self.like.shape)
        count, mean, squares = 0, 0.0, 0.0
        for rows in pieces(shape[axis], max(1, _TOGETHER * shape[axis] // math.prod(shape))):
            part = self.as_tensor().narrow(axis, rows.start, rows.stop - rows.start).double()
            difference, total = part.mean().item() - mean, count + part.numel()
            squares += ((part - part.mean()) ** 2).sum().item() + difference**2 * count * part.numel() / total
            mean += difference * part.numel() / total
            count = total
        normalized: LazyMetaTensor = (self.float() - mean) / (math.sqrt(squares / count) or 1.0)
        return normalized

    def ordinary(self) -> MetaTensor:
        """See :class:`LazyTensor`."""
        return self._described(self.values())

    def _described(self, values: torch.Tensor) -> MetaTensor:
        described: MetaTensor = values.as_subclass(MetaTensor)
        described.__dict__.update(self.__dict__)
        return described


def _defer(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any | None:
    """What an operator gives, without any value computed; None if it does not commute with cutting."""
    tensor = args[0] if args and isinstance(args[0], LazyTensor) else None
    if func in VOXELWISE:
        return _defer_voxelwise(func, args, kwargs)
    if tensor is None or not tensor.is_deferred:
        return None
    deferred = tensor.deferred
    if func in VIEWS or func in COPIES:
        memory = tensor._memory if func in VIEWS else None
        changes = (VIEWS if func in VIEWS else COPIES)[func](
            deferred.shape, *args[1:], **{k: v for k, v in kwargs.items() if k != "memory_format"}
        )
        if changes is None:
            return None
        likes = func(tensor.like, *args[1:], **kwargs)
        kind = type(tensor)
        if isinstance(changes, list):
            return [kind(deferred.seen(c), like, memory) for c, like in zip(changes, likes, strict=True)]
        return kind(deferred.seen(changes), likes, memory)
    if func in CASTS and torch.device(kwargs.get("device") or "cpu").type == "cpu":
        options = {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format")}
        dtype = kwargs.get("dtype") or tensor.dtype
        if kwargs.get("layout") not in (None, torch.strided) or kwargs.get("pin_memory") or dtype.is_complex:
            return None
        like = func(tensor.like, **options)
        cast = Voxelwise(torch.Tensor.to, (deferred, dtype), cast=dtype)
        return type(tensor)(cast, like)
    return None


def _defer_voxelwise(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any | None:
    lazy = [arg for arg in args if isinstance(arg, LazyTensor)]
    others = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor) and not isinstance(arg, LazyTensor)]
    if not all(t.is_deferred for t in lazy) or any(t.ndim or t.device.type != "cpu" for t in others):
        return None
    if len({t.like.shape for t in lazy}) != 1 or any(isinstance(v, LazyTensor) for v in kwargs.values()):
        return None
    constants = [
        a.detach().as_subclass(torch.Tensor).clone()
        if isinstance(a, torch.Tensor) and not isinstance(a, LazyTensor)
        else a
        for a in args
    ]
    dtype = func(*[torch.ones(1, dtype=a.like.dtype) if isinstance(a, LazyTensor) else a for a in constants], **kwargs).dtype
    if not same_bits_everywhere([dtype, *(t.dtype for t in (*lazy, *others))], kwargs):
        return None
    like = torch.empty_like(lazy[0].like, dtype=dtype)  # by the operator itself torch would import its compiler
    kind = LazyMetaTensor if any(isinstance(t, MetaTensor) for t in (*lazy, *others)) else LazyTensor
    deferred = [a.deferred if isinstance(a, LazyTensor) else a for a in constants]
    return kind(Voxelwise(func, tuple(deferred), kwargs), like)


def _at_once(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What an operator gives of the values."""
    if func in SHAPE_ONLY:
        stand_in = torch.empty_strided(args[0].like.size(), args[0].like.stride(), dtype=args[0].like.dtype)
        return func(stand_in, *args[1:], **kwargs)
    shares = any(argument.alias_info is not None for argument in func._schema.arguments)
    writes = func._schema.is_mutable
    real_args, real_kwargs = _with_values(args, kwargs, shares)
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*real_args, **real_kwargs)
    if not writes:
        return result
    lazy = [a for a in (*args, *kwargs.values()) if isinstance(a, LazyTensor)]
    real = [r for a, r in zip((*args, *kwargs.values()), (*real_args, *real_kwargs.values())) if isinstance(a, LazyTensor)]
    for a, r in zip(lazy, real, strict=True):
        if (r.shape, r.stride()) != (a.like.shape, a.like.stride()):
            raise RuntimeError(f"{func} would change the shape of a tensor in place; take a copy by load() before")
    given_back = {id(r): a for a, r in zip(lazy, real, strict=True)}
    return tree_map_only(torch.Tensor, lambda t: given_back.get(id(t), t), result)


def _with_values(args: Any, kwargs: Any, shared: bool) -> tuple[Any, Any]:
    real: tuple[Any, Any] = tree_map_only(LazyTensor, lambda tensor: tensor.values(shared), (args, kwargs))
    return real


def _steps(tensor: torch.Tensor) -> list[int]:
    """Strides of the axes along which there are any."""
    return [stride for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


def _collate(batch: Sequence[Any], *, collate_fn_map: Any = None) -> Any:
    """A batch of parts: torch asks the first tensor for its memory, and so for the whole volume."""
    loaded = [tensor.ordinary() if isinstance(tensor, LazyTensor) else tensor for tensor in batch]
    known = default_collate_fn_map  # MONAI adds MetaTensor when it first collates
    collate = known.get(type(loaded[0]), known[torch.Tensor])
    return collate(loaded, collate_fn_map=collate_fn_map)


default_collate_fn_map[LazyTensor] = default_collate_fn_map[LazyMetaTensor] = _collate
