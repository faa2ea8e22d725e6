# SPDX-License-Identifier: Apache-2.0
"""Values that are computed where they are asked for: parts of volumes, and what is done to each voxel by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from .lazy import LazyVolume

__all__ = ["Box", "Change", "Deferred", "Part", "Voxelwise"]


class Axis(NamedTuple):
    """An axis of an array: ``n`` voxels, ``step`` apart along the volume's axis ``along``; None repeats one voxel."""

    along: int | None
    step: int
    n: int


@dataclass(frozen=True)
class Box:
    """Which voxels of a volume an array has, and in which order.

    Args:
        first: the volume's voxel that the array's first one is.
        axes: the array's.

    Example:
        >>> volume = np.arange(6).reshape(2, 3)
        >>> Box.of(volume.shape).permute((1, 0)).flip(0).arranged(volume)
        array([[2, 5],
               [1, 4],
               [0, 3]])
    """

    first: tuple[int, ...]
    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, shape: Sequence[int]) -> Box:
        """All voxels of a volume."""
        return cls((0,) * len(shape), tuple(Axis(axis, 1, n) for axis, n in enumerate(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's."""
        return tuple(axis.n for axis in self.axes)

    def permute(self, dims: Sequence[int]) -> Box:
        """As ``torch.permute``."""
        return replace(self, axes=tuple(self.axes[dim] for dim in dims))

    def walk(self, dim: int, start: int, step: int, n: int) -> Box:
        """``n`` voxels along an axis, from ``start`` on; a step may be negative."""
        along, step_there, _ = self.axes[dim]
        return self._replaced(dim, start, [Axis(along, step_there * step, n)])

    def crop(self, index: Sequence[slice]) -> Box:
        """A slice without a step for each axis."""
        first, axes = list(self.first), []
        for (along, step, n), entry in zip(self.axes, index, strict=True):
            start, stop, _ = entry.indices(n)
            if along is not None:
                first[along] += start * step
            axes.append(Axis(along, step, max(0, stop - start)))
        return Box(tuple(first), tuple(axes))

    def moved(self, by: Sequence[int]) -> Box:
        """As many voxels elsewhere, so many further along each axis."""
        first = list(self.first)
        for (along, step, _), distance in zip(self.axes, by, strict=True):
            if along is not None:
                first[along] += distance * step
        return Box(tuple(first), self.axes)

    def flip(self, dim: int) -> Box:
        """As ``torch.flip`` of one axis."""
        n = self.axes[dim].n
        return self.walk(dim, max(0, n - 1), -1, n)

    def select(self, dim: int, index: int) -> Box:
        """As ``torch.select``."""
        return self._replaced(dim, index, [])

    def unsqueeze(self, dim: int) -> Box:
        """As ``torch.unsqueeze``."""
        return replace(self, axes=(*self.axes[:dim], Axis(None, 0, 1), *self.axes[dim:]))

    def repeat(self, dim: int, n: int) -> Box:
        """An axis of length one, repeated as ``torch.expand`` does it."""
        return self._replaced(dim, 0, [Axis(None, 0, n)])

    def spans(self) -> tuple[slice, ...]:
        """What must be read of the volume: one slice without a step for each of its axes."""
        spans = [slice(first, first + 1) for first in self.first]
        for along, step, n in self.axes:
            if along is not None:
                first = self.first[along]
                last = first + step * (n - 1)
                spans[along] = slice(min(first, last), max(first, last) + 1) if n else slice(0, 0)
        return tuple(spans)

    def arranged(self, read: np.ndarray) -> np.ndarray:
        """The array, as a view of what was read of the volume."""
        steps: list[Any] = [*[0] * len(self.first), ...]
        for along, step, _ in self.axes:
            if along is not None:
                steps[along] = slice(None, None, step)
        part: np.ndarray = read[tuple(steps)]
        order = [axis.along for axis in self.axes if axis.along is not None]
        if order != sorted(order):
            part = part.transpose(np.argsort(np.argsort(order)))
        if len(order) < len(self.axes):
            part = part[tuple(None if axis.along is None else slice(None) for axis in self.axes)]
            part = np.broadcast_to(part, self.shape)
        return part

    def _replaced(self, dim: int, start: int, axes: Sequence[Axis]) -> Box:
        """With other axes in the place of one, beginning at its voxel ``start``."""
        along, step, _ = self.axes[dim]
        first = self.first
        if along is not None:
            first = (*first[:along], first[along] + start * step, *first[along + 1 :])
        return Box(first, (*self.axes[:dim], *axes, *self.axes[dim + 1 :]))


Change: TypeAlias = Callable[[Box], Box]


class Deferred(ABC):
    """What an array's values are computed from; never changed."""

    steps: int
    """How much there is to do, a volume's voxels that are read counting as one."""

    @abstractmethod
    def seen(self, change: Change) -> Deferred:
        """The same of other voxels, or of the same in another order."""

    @abstractmethod
    def compute(self, known: dict[Part, torch.Tensor] | None = None) -> torch.Tensor:
        """The values, in memory of their own unless they are ``known``.

        Args:
            known: parts of volumes that were read already, to which others are added.
        """

    @abstractmethod
    def source(self) -> Hashable:
        """What tells the values from any others; None where that is not known."""

    @abstractmethod
    def stored(self) -> np.ndarray | None:
        """The same numbers as an array that is not to be written to, where the file has them; None elsewhere."""


@dataclass(frozen=True)
class Part(Deferred):
    """Voxels of a volume, as they are.

    Args:
        volume: where they are read.
        box: which ones.
    """

    volume: LazyVolume
    box: Box
    steps = 1

    def seen(self, change: Change) -> Part:
        """See :class:`Deferred`."""
        return Part(self.volume, change(self.box))

    def compute(self, known: dict[Part, torch.Tensor] | None = None) -> torch.Tensor:
        """See :class:`Deferred`."""
        known = {} if known is None else known
        if self not in known:
            read = self.volume[self.box.spans()]
            part = self.box.arranged(read)
            if read.base is not None or any(stride <= 0 for stride in part.strides):
                part = np.array(part, order="K")
            known[self] = torch.from_numpy(part)
        return known[self]

    def source(self) -> Hashable:
        """See :class:`Deferred`."""
        return None if self.volume.source is None else (self.volume.source, self.box)

    def into(self, out: np.ndarray) -> None:
        """Read the values into memory that is there, and convert them on the way.

        Args:
            out: of their shape and dtype, or of the :meth:`narrow_dtype`.
        """
        read, scaling = self.volume.stored_part(self.box.spans())
        scaling.into(out, self.box.arranged(read))

    def narrow_dtype(self) -> np.dtype[Any] | None:
        """A dtype of fewer bytes, from which a cast gives the values: the file's; None if it has no such."""
        return self.volume.narrow_dtype

    def stored(self) -> np.ndarray:
        """See :class:`Deferred`; in the file's dtype if that holds them."""
        return self.box.arranged(self.volume.values()[self.box.spans()])


@dataclass(frozen=True, eq=False)
class Voxelwise(Deferred):
    """A function of each voxel by itself.

    Args:
        function: gives a tensor of the shape of those that it is given.
        args: for it: :class:`Deferred` of one shape, and constants.
        kwargs: for it.
        cast: the dtype, of a function that only casts.
    """

    function: Callable[..., torch.Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    cast: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", 1 + sum(arg.steps for arg in self.args if isinstance(arg, Deferred)))

    def seen(self, change: Change) -> Voxelwise:
        """See :class:`Deferred`."""
        return replace(self, args=tuple(arg.seen(change) if isinstance(arg, Deferred) else arg for arg in self.args))

    def compute(self, known: dict[Part, torch.Tensor] | None = None) -> torch.Tensor:
        """See :class:`Deferred`."""
        known = {} if known is None else known
        args = [arg.compute(known) if isinstance(arg, Deferred) else arg for arg in self.args]
        return self.function(*args, **self.kwargs)

    def source(self) -> Hashable:
        """See :class:`Deferred`."""
        parts = [arg.source() if isinstance(arg, Deferred) else repr(arg) for arg in self.args]
        return None if None in parts else (str(self.function), *parts, repr(self.kwargs))

    def stored(self) -> np.ndarray | None:
        """See :class:`Deferred`."""
        before = self.args[0].stored() if self.cast is not None else None
        if before is None or self.cast in (None, torch.bfloat16):
            return None
        return before if np.can_cast(before.dtype, torch.empty(0, dtype=self.cast).numpy().dtype, "safe") else None
