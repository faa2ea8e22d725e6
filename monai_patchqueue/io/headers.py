# SPDX-License-Identifier: Apache-2.0
"""What the headers of files say about volumes, kept from one epoch to the next."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from monai.data import MetaTensor, NumpyReader
from monai.data.utils import is_no_channel
from monai.transforms.io.array import switch_endianness
from monai.utils import ImageMetaKey, MetaKeys

from .copies import own_copy
from .nifti import NiftiVoxels, nifti_files
from .reader import FastNiftiReader
from .regions import StoredFile

__all__ = ["HeaderOptions", "VolumeHeader", "channel_axis", "nifti_header", "npy_header", "tidied"]

KEPT_HEADERS = 4096
"""Files of which a process keeps what their headers say, about 10 KiB each."""


class HeaderOptions(NamedTuple):
    """How a loader understands headers; see :class:`LoadVolume` and MONAI's readers for what these mean."""

    simple_keys: bool
    prune_meta_pattern: str | None
    prune_meta_sep: str
    channel_dim: Any = None
    squeeze_non_spatial_dims: bool = False


Voxels = TypeVar("Voxels")


@dataclass(frozen=True, eq=False)
class VolumeHeader(Generic[Voxels]):
    """All that is known of a volume before its voxels are read; never changed.

    Args:
        voxels: reads them.
        channel_axis: the axis that has the channels; None if there is none.
        kept_meta: metadata as ``LoadImage`` gives them: numbers, strings, arrays and tensors.
        source: tells the file's content from any other.
    """

    voxels: Voxels
    channel_axis: int | None
    kept_meta: dict[Any, Any]
    source: Hashable

    def meta(self) -> dict[Any, Any]:
        """Metadata that belong to the caller, arrays included."""
        meta: dict[Any, Any] = own_copy(self.kept_meta)
        return meta


class NpyVoxels(NamedTuple):
    """The numbers of a .npy file; see :class:`StoredFile` for what these are."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: str

    def regions(self, mmap: bool) -> StoredFile:
        """What regions of the numbers can be read from."""
        return StoredFile(*self, mmap)


def nifti_header(file: str, options: HeaderOptions) -> VolumeHeader[NiftiVoxels] | None:
    """What the header of a NIfTI file says; None for files that nibabel had better read.

    It is read again once the file's size or time of change is another one. Threads and forked processes may share what
    is kept: it is never changed, and no lock is held.

    Raises:
        OSError: the file is missing, or ends within the header.
    """
    try:
        state = tuple(_state(part) for part in dict.fromkeys(nifti_files(file)))
    except OSError:
        return _read_nifti(file, options, None)  # which says what is wrong
    kept: VolumeHeader[NiftiVoxels] | None = _kept(_read_nifti, file, options, state)
    return kept


def npy_header(file: str, options: HeaderOptions) -> VolumeHeader[NpyVoxels] | None:
    """What the header of a .npy file says, as :func:`nifti_header`; None if it holds other than plain numbers."""
    kept: VolumeHeader[NpyVoxels] | None = _kept(_read_npy, file, options, _state(file))
    return kept


def channel_axis(meta: dict[Any, Any]) -> int | None:
    """The axis that has a volume's channels; None if there is none."""
    channel = meta[MetaKeys.ORIGINAL_CHANNEL_DIM]
    return None if is_no_channel(channel) else int(channel)


def tidied(meta: dict[Any, Any], file: str, ndim: int, options: HeaderOptions) -> dict[Any, Any]:
    """Metadata as ``LoadImage`` gives them.

    Args:
        meta: as a reader gives them.
        file: the volume's.
        ndim: its number of axes.
        options: what to leave out.
    """
    meta = switch_endianness(meta, "<")
    meta[ImageMetaKey.FILENAME_OR_OBJ] = file
    stand_in = MetaTensor.ensure_torch_and_prune_meta(np.zeros([1] * ndim), meta, *options[:3])
    tidy: dict[Any, Any] = stand_in.meta
    return tidy


@lru_cache(KEPT_HEADERS)
def _kept(
    read: Callable[[str, HeaderOptions, Hashable], Any], file: str, options: HeaderOptions, state: Hashable
) -> Any:
    return read(file, options, state)


def _read_nifti(file: str, options: HeaderOptions, state: Hashable) -> VolumeHeader[NiftiVoxels] | None:
    reader = _HeaderReader(options.channel_dim, squeeze_non_spatial_dims=options.squeeze_non_spatial_dims)
    image = reader.read(file)
    voxels = getattr(image, "dataobj", None)
    if not isinstance(voxels, NiftiVoxels):
        return None
    zeros, meta = reader.get_data(image)
    meta_of_it = tidied(meta, file, zeros.ndim, options)
    return VolumeHeader(voxels.reshaped(zeros.shape), channel_axis(meta), meta_of_it, state)


def _read_npy(file: str, options: HeaderOptions, state: Hashable) -> VolumeHeader[NpyVoxels] | None:
    mapped = np.load(file, mmap_mode="r")
    if mapped.dtype.kind not in "biuf" or not mapped.size or not mapped.ndim:
        return None
    _, meta = NumpyReader(channel_dim=options.channel_dim).get_data(mapped)
    order = "C" if mapped.flags.c_contiguous else "F"
    voxels = NpyVoxels(file, mapped.offset, mapped.shape, mapped.dtype, order)
    return VolumeHeader(voxels, channel_axis(meta), tidied(meta, file, mapped.ndim, options), state)


def _state(file: str) -> Hashable:
    """What changes with a file's content."""
    status = os.stat(file)
    return file, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class _HeaderReader(FastNiftiReader):
    """Gives all that :class:`FastNiftiReader` does but the voxels, in the place of which there is an array of zeros."""

    def _get_array_data(self, img: Any, filename: Any) -> np.ndarray:
        return np.broadcast_to(np.zeros((), img.dataobj.dtype), img.dataobj.shape)
