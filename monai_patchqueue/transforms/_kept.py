# SPDX-License-Identifier: Apache-2.0
"""Indices of labels and weight maps that are read lazily: kept from one epoch to the next, as the volumes are not."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any

import numpy as np

from ..io.lazy_tensor import LazyTensor
from ..sampling import LabelIndex, WeightIndex

__all__ = ["KeptIndices", "UnreadGuide", "kept_indices"]

Index = LabelIndex | WeightIndex
KEPT_NBYTES = 32 << 20
"""Of one process. A label of 192x192x160 voxels takes about half a MiB."""

OBJECTS_NBYTES = 2 << 10
"""What an index takes besides."""


class KeptIndices:
    """The indices used last, by the source of what they were made of.

    Args:
        limit: in bytes; the one that is in use may go beyond it.
    """

    def __init__(self, limit: int = KEPT_NBYTES) -> None:
        self._limit = limit
        self.forget()

    def forget(self) -> None:
        """Keep nothing of what was kept so far, and wait for no other thread."""
        self._lock = threading.Lock()
        self._indices: OrderedDict[Hashable, Index] = OrderedDict()
        self._nbytes: dict[Hashable, int] = {}
        self._total = 0
        self._used_last: dict[int, Hashable] = {}

    def get(self, source: Hashable, make: Callable[[], Any]) -> Any:
        """The index of a source, made if there is none; threads have each their own."""
        thread = threading.get_ident()
        key = (thread, source)  # an index in use changes
        with self._lock:
            self._weigh(self._used_last.get(thread))  # what it holds is known now that it has been drawn from
            index = self._indices.pop(key, None)
        if index is None:
            index = make()
        with self._lock:
            while self._indices and self._total - self._nbytes.get(key, 0) > self._limit:
                oldest, _ = self._indices.popitem(last=False)
                self._total -= self._nbytes.pop(oldest, 0)
            self._indices[key] = index
            self._used_last[thread] = key
        return index

    def _weigh(self, key: Hashable) -> None:
        index = self._indices.get(key)
        if index is not None:
            self._total -= self._nbytes.get(key, 0)
            self._nbytes[key] = index.nbytes + OBJECTS_NBYTES
            self._total += self._nbytes[key]


kept_indices = KeptIndices()

if hasattr(os, "register_at_fork"):
    # Another thread may hold the lock while a process is forked, where that thread does not go on.
    os.register_at_fork(after_in_child=kept_indices.forget)


class UnreadGuide:
    """A lazily read label or weight map, in the place of the array: it is read where its index does not do.

    Args:
        guide: channel-first, without pending operations.
        source: what tells it from any other.
    """

    def __init__(self, guide: LazyTensor, source: Hashable) -> None:
        self.source = source
        self._guide = guide

    @cached_property
    def numbers(self) -> np.ndarray:
        """The whole of it, in the dtype of the file if that has its values."""
        return self._guide.numbers()

    def __getitem__(self, channel: int) -> np.ndarray:
        """One channel."""
        read: np.ndarray = self.numbers[channel]
        return read
