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

    def of(self, volume: Any) -> Index | None:
        """The index if it was made of this very volume, unchanged since; else None."""
        if self._volume is None or volume is None or self._volume() is not volume:
            return None
        return self._index if self._state is not None and self._state == _state(volume) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> ReusableIndex[Index]:
        volume = None if self._volume is None else self._volume()
        if volume is None or self.of(volume) is None:
            return ReusableIndex()
        return ReusableIndex(self._index, copy.deepcopy(volume, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return (ReusableIndex, ())


def _state(volume: Any) -> tuple[Any, ...] | None:
    """All by which a change shows; None where torch does not count changes."""
    if volume.is_inference():
        return None
    plain = volume.detach().as_subclass(torch.Tensor)
    step = max(1, round((plain.numel() / GLIMPSE_VOXELS) ** (1 / max(1, plain.ndim))))
    glimpse = plain[tuple(slice(min(step // 2, n - 1), None, step) for n in plain.shape)]
    seen = glimpse.contiguous().view(torch.uint8) if glimpse.dtype != torch.bool else glimpse
    return (plain.data_ptr(), plain.shape, plain.stride(), plain.dtype, plain._version, seen.cpu().numpy().tobytes())


# torch.load refuses unknown classes by default, and MONAI's PersistentDataset keeps items by torch.save.
torch.serialization.add_safe_globals([ReusableIndex])
