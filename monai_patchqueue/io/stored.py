# SPDX-License-Identifier: Apache-2.0
"""Items of a dataset in a folder of entries: arrays in chunks, all else as plain data."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from .chunks import ChunkedFile, compress, default_chunk_shape
from .copies import own_copy
from .entries import EntryFolder
from .lazy import LazyVolume
from .lazy_meta_tensor import LazyMetaTensor
from .narrowing import narrowed
from .plain import Tagged, decode, encode
from .scaling import Scaling

__all__ = ["StoredIndices", "StoredItems", "StoredVolume"]

logger = logging.getLogger(__name__)

SMALL_BYTES = 4096
"""Smaller arrays are kept as plain data."""
REMEMBERED = 1024
"""Entries of which a process keeps what their manifests say, about 25 KiB each for an image and a label."""
MAPPED_INDICES = 64
"""Indices of which a process keeps the files open."""


class StoredIndices:
    """Where the indices of a stored volume are kept: entries beside its own, made when they are first needed.

    Args:
        folder: of all entries.
        volume: the name of the volume's entry, and its file in there.
    """

    def __init__(self, folder: EntryFolder, volume: str) -> None:
        self._folder = folder
        self._volume = volume

    def get(self, what: str, make: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """The arrays of an index, in dictionaries.

        Args:
            what: which index, in letters that a file's name may have.
            make: makes them; None where none are to be kept.
        """
        name = f"{self._volume}.{what}"
        damage: Exception | None = None
        try:
            return _arrays(*_version(self._folder, name))
        except (OSError, ValueError) as error:
            damage = error if name in self._folder else None
        arrays = make()
        if arrays is None:
            return None
        try:
            if damage:
                logger.warning("an index is made again: %s", damage)
                self._folder.remove(name)
            files: dict[str, bytes] = {}
            content = encode(arrays, lambda array, path: _keep_raw(array, path, files))
            self._folder.write(name, content, files)
            return _arrays(*_version(self._folder, name))
        except OSError as error:
            logger.warning("an index is not kept, and will be made again in each epoch: %s", error)
            return arrays


class StoredVolume(LazyVolume):
    """A volume in a :class:`StoredItems`, of which the chunks that a patch touches are read.

    Args:
        stored: the numbers, in the smallest dtype that holds them.
        dtype: of the volume.
        kind: what the volume was: ``"MetaTensor"``, ``"tensor"`` or ``"array"``.
        meta: metadata, of a MetaTensor.
        applied_operations: its trace.
        indices: what is known of it as label or weight map.
    """

    def __init__(
        self,
        stored: ChunkedFile,
        dtype: np.dtype[Any],
        kind: str,
        meta: dict[Any, Any] | None,
        applied_operations: list[Any],
        indices: StoredIndices,
    ) -> None:
        super().__init__(stored, Scaling(dtype=dtype), meta, channel_axis=0)
        self.kind = kind
        self._chunks = stored
        self.applied_operations = applied_operations
        self.indices = indices

    def renewed(self) -> StoredVolume:
        """The same volume, with metadata that belong to the caller.

        Raises:
            FileNotFoundError: its file is not there any more.
        """
        meta, operations = (_renewed(part, StoredVolume.load) for part in (self.meta, self.applied_operations))
        return StoredVolume(self._chunks.renewed(), self.dtype, self.kind, meta, operations, self.indices)

    def load(self) -> Any:
        """The whole volume, as what it was, in memory of its own."""
        whole = np.ascontiguousarray(self[()])
        if self.kind == "array":
            return whole
        tensor = torch.from_numpy(whole)
        if self.kind == "tensor":
            return tensor
        return MetaTensor(tensor, meta=self.meta, applied_operations=self.applied_operations)

    def lazily(self) -> Any:
        """The volume as what it was, of which chunks are read where something needs them; arrays are loaded."""
        if self.kind == "array":
            return self.load()
        tensor = LazyMetaTensor.of(self)
        tensor.applied_operations = self.applied_operations
        return tensor if self.kind == "MetaTensor" else tensor.as_tensor()


class StoredItems:
    """Writes items as entries, and reads them with volumes in the place of their arrays.

    Args:
        folder: of all entries.
        chunk_shape: chunks along the spatial axes, one size for all or one for each; None: 64 along each of three.
        mmap: map files into memory instead of reading from them.
    """

    def __init__(self, folder: EntryFolder, chunk_shape: int | Sequence[int] | None = None, mmap: bool = True) -> None:
        self.folder = folder
        self._chunk_shape = chunk_shape
        self._mmap = mmap

    def write(self, name: str, item: Any) -> int:
        """Write an item, unless it is there; gives the number of bytes that it takes.

        Raises:
            OSError: the disk is full, among other things.
            TypeError: the item has a value that is no plain data.
        """
        files: dict[str, bytes] = {}
        return self.folder.write(name, encode(item, lambda array, path: self._keep(array, path, files)), files)

    def read(self, name: str) -> Any:
        """An item whose arrays are :class:`StoredVolume`, the small ones aside.

        Raises:
            FileNotFoundError: it is not there.
            DamagedEntry: its manifest is not what was written.
        """
        return _renewed(_item(*_version(self.folder, name), self._mmap), StoredVolume.renewed)

    def _keep(self, array: Any, path: str, files: dict[str, bytes]) -> Tagged | None:
        numbers = _numpy(array)
        if numbers is None or numbers.nbytes < SMALL_BYTES or numbers.ndim == 0:
            return None
        axes = max(1, numbers.ndim - 1)
        if isinstance(self._chunk_shape, int):
            chunk: tuple[int, ...] = (self._chunk_shape,) * axes
        else:
            chunk = default_chunk_shape(axes) if self._chunk_shape is None else tuple(self._chunk_shape)
        if len(chunk) > numbers.ndim:
            raise ValueError(
                f"{path.lstrip('/')}: chunk_shape {list(chunk)} is for {len(chunk)} spatial axes, and there is an "
                f"array of shape {list(numbers.shape)}"
            )
        file = _file_name(path, files)
        stored = narrowed(numbers)
        files[file] = compress(stored, chunk)
        beside: list[Any]
        kind, beside = "tensor" if isinstance(array, torch.Tensor) else "array", [None, []]
        if isinstance(array, MetaTensor):
            kind, beside = "MetaTensor", [array.meta, array.applied_operations]
        beside = [encode(v, lambda array, path: self._keep(array, path, files), f"{path}.meta") for v in beside]
        return Tagged("volume", [file, kind, list(numbers.shape), stored.dtype.str, numbers.dtype.str, *beside])


def _numpy(array: Any) -> np.ndarray | None:
    """An array as numpy's, C-contiguous as MONAI's caches have it; None where it is of a dtype that numpy lacks."""
    if isinstance(array, torch.Tensor):
        try:
            array = array.detach().as_subclass(torch.Tensor).cpu().numpy()
        except TypeError:
            return None
    return np.ascontiguousarray(array) if array.dtype.kind in "biufc" else None


def _file_name(path: str, files: dict[str, bytes], suffix: str = ".b2nd") -> str:
    """A name for the array that keys lead to, which no other file has."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", path).strip("_")[:80] or "array"
    names = (f"{stem}{number or ''}{suffix}" for number in range(len(files) + 1))
    return next(name for name in names if name not in files)


def _keep_raw(array: Any, path: str, files: dict[str, bytes]) -> Tagged | None:
    if array.nbytes < SMALL_BYTES:
        return None
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    file = _file_name(path, files, ".npy")
    files[file] = buffer.getvalue()
    return Tagged("npy", file)


def _version(folder: EntryFolder, name: str) -> tuple[Path, str, int, int]:
    """Arguments for what is remembered of an entry: other ones if it was removed and written again."""
    status = folder.path(name).stat()
    return folder.root, name, status.st_ino, status.st_mtime_ns


@lru_cache(REMEMBERED)
def _item(root: Path, name: str, _inode: int, _mtime: int, mmap: bool) -> Any:
    """An item as it is kept, which is never handed out itself."""
    folder = EntryFolder(root)

    def volume(_: str, content: list[Any]) -> StoredVolume:
        file, kind, shape, stored, dtype, *beside = content
        meta, operations = (decode(v, volume) for v in beside)
        numbers = ChunkedFile(str(folder.path(name, file)), shape, np.dtype(stored), mmap)
        return StoredVolume(numbers, np.dtype(dtype), kind, meta, operations, StoredIndices(folder, f"{name}.{file}"))

    return decode(folder.read(name), volume)


def _renewed(value: Any, volume: Callable[[StoredVolume], Any]) -> Any:
    """What is kept, as it is handed out: with copies of plain data."""
    if isinstance(value, StoredVolume):
        return volume(value)
    if type(value) is dict:
        return {key: _renewed(v, volume) for key, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)([_renewed(v, volume) for v in value])
    return own_copy(value)


@lru_cache(MAPPED_INDICES)
def _arrays(root: Path, name: str, _inode: int, _mtime: int) -> dict[str, Any]:
    folder = EntryFolder(root)
    arrays: dict[str, Any] = decode(folder.read(name), lambda _, file: np.load(folder.path(name, file), mmap_mode="r"))
    return arrays
