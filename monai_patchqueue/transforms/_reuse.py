# SPDX-License-Identifier: Apache-2.0
"""Indices that travel with an item, and the proof that an index still belongs to its volume."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import torch

from ..sampling import LabelIndex, WeightIndex

Index = TypeVar("Index", LabelIndex, WeightIndex)
GLIMPSE_VOXELS = 4096


def label_index_key(key: Hashable) -> str:
    """Where the index of a label is kept in an item."""
    return f"{key}_label_index"


def weight_index_key(key: Hashable) -> str:
    """Where the index of a weight map is kept in an item."""
    return f"{key}_weight_index"


class ReusableIndex(Generic[Index]):
    """An index and the tensor it was made of.

    It is valid for that very tensor as long as torch has counted no change to it. A glimpse of some thousand voxels
    besides shows most changes made behind torch's back, through a numpy view. A deep copy of an item keeps the pair of
    tensor and index together and shares the index. A pickle drops the index: making it anew costs less than reading the
    volume did.
    """

    def __init__(self, index: Index | None = None, volume: torch.Tensor | None = None) -> None:
        self._index: Index | None = index
        self._volume = None if volume is None else weakref.ref(volume)
        self._state = None if volume is None else _state(volume)
        self._glimpse = None if volume is None else _glimpse(volume)

    def of(self, volume: Any) -> Index | None:
        """The index if it was made of this very volume, unchanged since; else None."""
        current = self._current()
        if current is None or current is not volume or self._glimpse != _glimpse(current):
            return None
        return self._index

    def _current(self) -> torch.Tensor | None:
        """The volume, as long as torch has counted no change to it."""
        volume = None if self._volume is None else self._volume()
        return volume if volume is not None and self._state is not None and self._state == _state(volume) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> ReusableIndex[Index]:
        copied: ReusableIndex[Index] = ReusableIndex()
        volume = self._current()
        if volume is not None:
            # The copy is glimpsed at when it is used, and compared with what was seen when the index was made.
            of_copy = copy.deepcopy(volume, memo)
            copied._index, copied._glimpse = self._index, self._glimpse
            copied._volume, copied._state = weakref.ref(of_copy), _state(of_copy)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return (ReusableIndex, ())


def _state(volume: torch.Tensor) -> tuple[Any, ...] | None:
    """What changes with a tensor, as torch counts it; None where it does not."""
    plain = volume.as_subclass(torch.Tensor)
    if plain.is_inference():
        return None
    return (plain.data_ptr(), plain.shape, plain.stride(), plain.dtype, plain._version)


def _glimpse(volume: torch.Tensor) -> bytes:
    """Some thousand voxels, from all over the volume."""
    plain = volume.as_subclass(torch.Tensor).detach()
    axes = sum(n > 1 for n in plain.shape)
    step = max(1, round((plain.numel() / GLIMPSE_VOXELS) ** (1 / max(1, axes))))
    seen = plain[tuple(slice(min(step // 2, n - 1), None, step) for n in plain.shape)].contiguous()
    shown: bytes = (seen if seen.dtype == torch.bool else seen.view(torch.uint8)).cpu().numpy().tobytes()
    return shown


# torch.load refuses unknown classes by default, and MONAI's PersistentDataset keeps items by torch.save.
torch.serialization.add_safe_globals([ReusableIndex])
