# SPDX-License-Identifier: Apache-2.0
"""Regions of an array that lies in a file uncompressed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["StoredFile"]


class StoredFile:
    """An uncompressed array in a file, of which the regions that are asked for are read.

    The file is opened at the first access, in each process anew after pickling.

    Args:
        file: its path.
        offset: where the array begins, in bytes.
        shape: the array's shape.
        dtype: as the numbers are stored, byte order included.
        order: ``"F"`` if the first axis is the fastest, ``"C"`` if it is the last.
        mmap: map the file into memory instead of reading from it.

    Raises:
        OSError: the file is too short to hold the array.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     np.arange(12, dtype=np.int16).tofile(file.name)
        ...     StoredFile(file.name, 0, (3, 4), np.dtype(np.int16), order="C")[1:, 2:]
        array([[ 6,  7],
               [10, 11]], dtype=int16)
    """

    def __init__(
        self, file: str, offset: int, shape: Sequence[int], dtype: np.dtype[Any], order: str, mmap: bool = False
    ) -> None:
        self.file = file
        self.offset = offset
        self.shape = tuple(shape)
        self.dtype = dtype
        self.order = order
        self.mmap = mmap
        check_length(file, offset, self.shape, dtype)
        self._mapped: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}  # a pickled map would hold the whole file

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """A region: one slice without a step for each axis."""
        if self.mmap:
            if self._mapped is None:
                mapped: Any = np.memmap(self.file, self.dtype, "r", self.offset, self.shape, self.order)  # type: ignore[call-overload]
                self._mapped = mapped.view(np.ndarray)
            region: np.ndarray = self._mapped[index]
            return region
        box = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)]
        return self._read(box[::-1]).T if self.order == "F" else self._read(box)

    def _read(self, box: list[tuple[int, int]]) -> np.ndarray:
        """A box of start and stop per axis, slowest axis first.

        Rows are read whole: a disk gives whole pages, and one read of some rows costs less than one read for each.
        """
        shape = self.shape[::-1] if self.order == "F" else self.shape
        size = [max(0, b - a) for a, b in box]
        # Axes after `split` are read whole, so that what is wanted along `split` is contiguous.
        split = max(len(shape) - 2, 0)
        while split > 0 and all(size[axis] == shape[axis] for axis in range(split, len(shape))):
            split -= 1
        inner = shape[split + 1 :]
        row = math.prod(inner)
        out = np.empty((*size[: split + 1], *inner), self.dtype)
        if out.size == 0:
            return np.empty(size, self.dtype)
        with open(self.file, "rb", buffering=0) as file:
            for place in np.ndindex(*size[:split]):
                first = 0
                for axis, at in enumerate(place):
                    first = first * shape[axis] + box[axis][0] + at
                first = (first * shape[split] + box[split][0]) * row
                file.seek(self.offset + first * self.dtype.itemsize)
                fill_from(file, out[place], self.file)
        wanted: np.ndarray = out[tuple([slice(None)] * (split + 1) + [slice(a, b) for a, b in box[split + 1 :]])]
        return wanted


def check_length(file: str, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raise OSError if a file is too short to hold an array."""
    found, expected = os.path.getsize(file), offset + math.prod(shape) * dtype.itemsize
    if found < expected:
        raise OSError(
            f"{file!r} is truncated: it has {found} bytes, but an array of shape {list(shape)} and dtype {dtype} from "
            f"byte {offset} on, as its header says, needs {expected}; copy or download the file again"
        )


def fill_from(file: Any, out: np.ndarray, name: str) -> None:
    """Fill a contiguous array with the bytes that come next in a file.

    Raises:
        OSError: the file ends before.
    """
    flat: Any = out.reshape(-1).view(np.uint8)
    view = memoryview(flat)
    done = 0
    while done < len(view):
        n = file.readinto(view[done:])
        if not n:
            raise OSError(f"{name!r} has become shorter: {len(view) - done} bytes are missing of {len(view)} wanted")
        done += n
