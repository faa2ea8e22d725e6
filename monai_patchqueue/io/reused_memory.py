# SPDX-License-Identifier: Apache-2.0
"""Memory that is used again for the next volume."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np

__all__ = ["ReusedMemory", "decompressed", "is_idle"]


def _references(buffers: list[np.ndarray[Any, Any]], index: int) -> int:
    return sys.getrefcount(buffers[index])


_WHEN_IDLE = _references([np.empty(1, np.uint8)], 0)


def is_idle(buffers: list[np.ndarray[Any, Any]], index: int) -> bool:
    """Whether nothing but the list refers to a buffer that owns its memory: no view of it, and no tensor over it.

    Example:
        >>> buffers = [np.empty(8, np.uint8)]
        >>> view = buffers[0][2:4].view(np.int16)
        >>> is_idle(buffers, 0)
        False
        >>> del view
        >>> is_idle(buffers, 0)
        True
    """
    return _references(buffers, index) <= _WHEN_IDLE


class ReusedMemory(threading.local):
    """Large arrays over memory that was touched before, once nobody refers to what it held.

    The system clears each page that a process touches for the first time, which takes as long as decompressing into it.
    malloc gives arrays of more than 16 MiB back to the system as soon as they are freed, so they are kept here. Each
    thread has its own.

    Example:
        >>> memory = ReusedMemory()
        >>> memory.keep(1)
        >>> first = memory.take(1000, np.dtype(np.int16))
        >>> address = first.ctypes.data
        >>> memory.take(1000, np.dtype(np.int16)).ctypes.data == address
        False
        >>> del first
        >>> memory.take(500, np.dtype(np.float32)).ctypes.data == address
        True
    """

    def __init__(self) -> None:
        self._most = 0
        self._buffers: list[np.ndarray[Any, Any]] = []

    def keep(self, most: int) -> None:
        """Keep the memory of so many arrays from now on."""
        self._most = most

    def take(self, count: int, dtype: np.dtype[Any]) -> np.ndarray:
        """An array of one axis, with any content, whose memory nobody else refers to."""
        nbytes = count * dtype.itemsize
        idle = [i for i in range(len(self._buffers)) if is_idle(self._buffers, i)]
        fitting = [i for i in idle if nbytes <= self._buffers[i].nbytes <= 2 * nbytes]
        if fitting:
            buffer = self._buffers[fitting[0]]
        else:
            if len(self._buffers) >= self._most and idle:
                del self._buffers[idle[0]]
            buffer = np.empty(nbytes, np.uint8)
            if len(self._buffers) < self._most:
                self._buffers.append(buffer)
        return buffer[:nbytes].view(dtype)


decompressed = ReusedMemory()
"""For volumes of compressed files. Nothing is kept where nobody has said so."""
