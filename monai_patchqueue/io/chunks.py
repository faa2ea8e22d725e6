# SPDX-License-Identifier: Apache-2.0
"""Arrays in files, in compressed chunks, of which a region is read by decompressing the blocks that it touches."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

__all__ = ["ChunkedFile", "compress", "default_chunk_shape", "library"]

CHUNK_VOXELS = 1 << 18
BLOCK_VOXELS = 1 << 13
"""Chunks are what a file is made of; blocks within them are what is decompressed for a region. Both were measured."""

OPEN_FILES = 128
"""Files that one thread keeps open: opening one takes as long as reading a small patch."""


@cache
def library() -> Any:
    """The library that compresses; not imported before it is needed, as it brings more modules than this package has.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import blosc2  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError("chunked volumes need blosc2: pip install 'monai_patchqueue[store]'") from error
    return blosc2


def default_chunk_shape(axes: int) -> tuple[int, ...]:
    """Chunks for random cubic patches.

    >>> default_chunk_shape(3), default_chunk_shape(2)
    ((64, 64, 64), (512, 512))
    """
    return (int(CHUNK_VOXELS ** (1 / axes) + 1e-6),) * axes


def block_shape(chunk: Sequence[int]) -> tuple[int, ...]:
    """Blocks within a chunk, longer along the axis that is contiguous.

    >>> block_shape((64, 64, 64)), block_shape((512, 512)), block_shape((8, 64, 64))
    ((16, 16, 32), (64, 128), (8, 16, 32))
    """
    side = int((BLOCK_VOXELS / 2) ** (1 / len(chunk)) + 1e-6)
    return tuple(min(n, side if axis < len(chunk) - 1 else 2 * side) for axis, n in enumerate(chunk))


def compress(array: np.ndarray, chunk_shape: Sequence[int]) -> bytes:
    """The content of a file for :class:`ChunkedFile`.

    The codec is blosc2's LZ4HC: it compresses slowly, once, and is decompressed as fast as LZ4 or faster. Bytes are
    shuffled where a number has several.

    Args:
        array: of any numeric dtype.
        chunk_shape: chunk along each of the last axes; along the axes before (channels) it is 1.
    """
    inner = tuple(min(int(c), n) for c, n in zip(chunk_shape, array.shape[-len(chunk_shape) :], strict=True))
    outer = (1,) * (array.ndim - len(inner))
    blosc2 = library()
    shuffle = blosc2.Filter.SHUFFLE if array.dtype.itemsize > 1 else blosc2.Filter.NOFILTER
    parameters = {"codec": blosc2.Codec.LZ4HC, "clevel": 9, "filters": [shuffle], "nthreads": 1}
    chunked = blosc2.asarray(
        np.ascontiguousarray(array), chunks=(*outer, *inner), blocks=(*outer, *block_shape(inner)), cparams=parameters
    )
    frame: bytes = chunked.to_cframe()
    return frame


class _OpenFiles(threading.local):
    """Each thread has its own: two threads must not decompress by one handle at the same time."""

    def __init__(self) -> None:
        self.handles: OrderedDict[tuple[Any, ...], Any] = OrderedDict()


_open_files = _OpenFiles()


class ChunkedFile:
    """A compressed array in a file, of which the regions that are asked for are read.

    The file is opened at the first access, by each thread and in each process anew.

    Args:
        file: its path.
        shape: the array's shape.
        dtype: the array's dtype.
        mmap: map the file into memory instead of reading from it.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     size = file.write(compress(np.arange(12).reshape(3, 4), (2, 2)))
        ...     file.flush()
        ...     ChunkedFile(file.name, (3, 4), np.dtype(np.int64))[1:, 2:]
        array([[ 6,  7],
               [10, 11]])
    """

    def __init__(self, file: str, shape: Sequence[int], dtype: np.dtype[Any], mmap: bool = True) -> None:
        self.file = file
        self.shape = tuple(shape)
        self.dtype = dtype
        self.mmap = mmap
        status = os.stat(file)
        self._key = (file, mmap, status.st_ino, status.st_mtime_ns)

    def renewed(self) -> ChunkedFile:
        """The same array, in the file that is there now."""
        return ChunkedFile(self.file, self.shape, self.dtype, self.mmap)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """A region: one slice without a step for each axis.

        Raises:
            OSError: the file is damaged.
        """
        start, stop = [], []
        for wanted, n in zip(index, self.shape, strict=True):
            first, last, _ = wanted.indices(n)
            start.append(first)
            stop.append(max(first, last))
        region = np.empty([b - a for a, b in zip(start, stop, strict=True)], self.dtype)
        if region.size:
            try:
                self._handle().get_slice_numpy(region, (tuple(start), tuple(stop)))
            except RuntimeError as error:
                raise OSError(
                    f"{self.file!r} is damaged: {error} at {start} to {stop} of {list(self.shape)}; "
                    "ChunkedDataset.verify(remove=True) finds what is, and has it prepared again"
                ) from error
        return region

    def _handle(self) -> Any:
        handles = _open_files.handles
        handle = handles.get(self._key)
        if handle is None:
            # One thread each: the loader's workers are as many as there shall be.
            options = {"mmap_mode": "r"} if self.mmap else {}
            handle = handles[self._key] = library().open(self.file, mode="r", dparams={"nthreads": 1}, **options)
            if len(handles) > OPEN_FILES:
                handles.popitem(last=False)
        else:
            handles.move_to_end(self._key)
        return handle
