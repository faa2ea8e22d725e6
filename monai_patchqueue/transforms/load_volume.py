# SPDX-License-Identifier: Apache-2.0
"""Loading volumes: MONAI's ``LoadImage``, at the speed at which the files can be decompressed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NumpyReader, get_track_meta
from monai.transforms import LoadImage, LoadImaged
from monai.utils import MetaKeys, PostFix, SpaceKeys, ensure_tuple, get_equivalent_dtype

from ..io.headers import HeaderOptions, channel_axis, nifti_header, npy_header, tidied
from ..io.lazy import LazyVolume
from ..io.lazy_meta_tensor import LazyMetaTensor
from ..io.nifti import is_nifti
from ..io.reader import FastNiftiReader
from ..io.scaling import Scaling
from ..io.zarr_arrays import is_zarr, open_zarr

__all__ = ["LoadVolume", "LoadVolumeD", "LoadVolumeDict", "LoadVolumed"]

_WIDER = {np.dtype(np.uint16): np.int32, np.dtype(np.uint32): np.int64, np.dtype(np.uint64): np.int64}
"""What MONAI makes tensors of, out of dtypes that torch lacks or has no arithmetic for."""


class LoadVolume(LoadImage):
    """MONAI's ``LoadImage``, faster for NIfTI files.

    Values, dtype, affine and metadata are those of ``LoadImage``. The voxels stay in the order of axes in memory that
    the file has; ``LoadImage`` brings them into C order, which takes as long as decompressing them. Files in other
    formats, lists of files, and files with unusual headers go to MONAI's readers. A .hdr and .img pair is read as
    ``NibabelReader`` reads it.

    Zarr stores, which MONAI has no reader for, are read by the package zarr (extra ``zarr``): paths with a part that
    ends in ``.zarr``. They lead to an array, or to the group of an OME-Zarr image (0.4 or 0.5), of which the first
    level is taken. Axes come in the order channels, x, y, z, the affine from the image's scale, translation and units.

    Args:
        reader: MONAI's readers to use, for every file; None: ours for NIfTI, and MONAI's choice for all else.
        image_only: give the volume only, not the volume and its metadata.
        dtype: of the result; None keeps what the file's header says.
        ensure_channel_first: add an axis for channels, or move it to the front.
        simple_keys: keep only the most important metadata.
        prune_meta_pattern: regular expression of metadata keys to leave out.
        prune_meta_sep: separator of nested keys in that pattern.
        expanduser: expand ``~`` in file names.
        lazy_read: give a :class:`~monai_patchqueue.LazyMetaTensor` of a NIfTI or .npy file or a Zarr store: dtype and
            scale, and what MONAI's transforms do to each voxel by itself, are applied to the patches that are cut
            later. Of a file that is not compressed only patches are read, of a Zarr store their chunks. Needs
            ``ensure_channel_first=True``.
        mmap: map uncompressed files into memory for lazy reading, instead of reading from them. Faster where the files
            are in the system's cache or on a network drive; slower on a cold local disk.
        args: for the readers.
        kwargs: for the readers, such as ``channel_dim``.

    Raises:
        ValueError: if ``lazy_read`` is asked for without ``ensure_channel_first``, or with a ``reader``.
    """

    def __init__(
        self,
        reader: Any = None,
        image_only: bool = True,
        dtype: Any = np.float32,
        ensure_channel_first: bool = False,
        simple_keys: bool = False,
        prune_meta_pattern: str | None = None,
        prune_meta_sep: str = ".",
        expanduser: bool = True,
        *args: Any,
        lazy_read: bool = False,
        mmap: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            reader,
            image_only,
            dtype,
            ensure_channel_first,
            simple_keys,
            prune_meta_pattern,
            prune_meta_sep,
            expanduser,
            *args,
            **kwargs,
        )
        if lazy_read and not ensure_channel_first:
            raise ValueError("volumes that are read lazily are channel-first: give ensure_channel_first=True as well")
        if lazy_read and reader is not None:
            raise ValueError(f"a reader of your choice ({reader!r}) reads whole volumes: leave it out, or lazy_read")
        self.lazy_read = lazy_read
        self.mmap = mmap
        self._channel_dim = kwargs.get("channel_dim")
        self._nifti_options: dict[str, Any] | None = None
        self._npy_options: dict[str, Any] | None = None
        target = None if dtype is None else np.dtype(get_equivalent_dtype(dtype, np.ndarray))
        if reader is None:
            nifti, npy = _made_for(FastNiftiReader, args, kwargs), _made_for(NumpyReader, args, kwargs)
            self.register(nifti)
            if target not in _WIDER:
                self._npy_options = {"channel_dim": npy.channel_dim}
            if target not in _WIDER and not (nifti.as_closest_canonical or nifti.to_gpu or nifti.kwargs):
                squeeze = nifti.squeeze_non_spatial_dims
                self._nifti_options = {"channel_dim": nifti.channel_dim, "squeeze_non_spatial_dims": squeeze}
        self._target = target

    def __call__(self, filename: Any, reader: Any = None) -> Any:
        """Load a volume.

        Args:
            filename: file, or files to be stacked as channels.
            reader: MONAI's reader to use, for this call.

        Returns:
            A MetaTensor (a tensor where metadata are not tracked); with ``image_only=False`` a pair of
            that and its metadata.

        Raises:
            ImportError: a Zarr store, and the package zarr is not installed.
            OSError: the file is missing, truncated or corrupt.
            RuntimeError: no reader can read it.
            ValueError: a Zarr store that is no volume.
        """
        names = ensure_tuple(filename)
        if reader is None and len(names) == 1 and isinstance(names[0], (str, os.PathLike)):
            name = str(Path(names[0]).expanduser()) if self.expanduser else os.fspath(names[0])
            volume = self._volume(name)
            if isinstance(volume, LazyVolume):
                volume = LazyMetaTensor.of(volume)
            if volume is not None:
                return volume if self.image_only else (volume, getattr(volume, "meta", {}))
        return super().__call__(filename, reader)

    def _volume(self, name: str) -> Any | None:
        """The volume of a file; None if it is one for MONAI's readers."""
        if is_nifti(name):
            return self._nifti(name)
        if name.endswith(".npy"):
            return self._npy(name)
        return self._zarr(name) if self.auto_select and is_zarr(name) else None

    def _nifti(self, name: str) -> Any | None:
        """The volume of a NIfTI file; None if it is one for MONAI's readers."""
        if self._nifti_options is None or not get_track_meta():
            return None
        header = nifti_header(name, self._header_options(**self._nifti_options))
        if header is None:
            return None
        voxels, axis, meta = header.voxels, header.channel_axis, header.meta()
        scaling = voxels.converted_to(self._target_of(voxels.dtype))
        if self.lazy_read:
            return LazyVolume(voxels.regions(self.mmap), scaling, meta, axis, header.source)
        array = voxels.read(scaling)
        if self.ensure_channel_first:
            array = array[None] if axis is None else np.moveaxis(array, axis, 0)
        return MetaTensor(torch.from_numpy(array), meta=meta)

    def _npy(self, name: str) -> Any | None:
        """The volume of a .npy file, if it is to be read lazily; None if it is one for MONAI's readers."""
        if not self.lazy_read or self._npy_options is None or not get_track_meta():
            return None
        header = npy_header(name, self._header_options(**self._npy_options))
        if header is None:
            return None
        stored = header.voxels.regions(self.mmap)
        scaling = Scaling(dtype=self._target_of(stored.dtype))
        volume = LazyVolume(stored, scaling, header.meta(), header.channel_axis, header.source)
        return LazyMetaTensor.of(volume, order="C")  # which MONAI's readers bring it into

    def _zarr(self, name: str) -> Any:
        """The volume in a Zarr store."""
        stored, layout, _ = open_zarr(name, self._channel_dim)
        target = self._target_of(stored.dtype.newbyteorder("="))
        meta = {
            MetaKeys.AFFINE: layout.affine,
            MetaKeys.ORIGINAL_AFFINE: layout.affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.asarray(stored.shape[layout.has_channels :]),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: 0 if layout.has_channels else float("nan"),
        }
        axis = channel_axis(meta)
        tracked = get_track_meta()
        meta = tidied(meta, name, len(stored.shape), self._header_options()) if tracked else {}
        volume = LazyVolume(stored, Scaling(dtype=target), meta, axis)
        if self.lazy_read and tracked:
            return volume
        whole = volume.load() if tracked else torch.from_numpy(volume[()])
        return whole if self.ensure_channel_first or axis is not None else whole[0]

    def _header_options(self, **of_reader: Any) -> HeaderOptions:
        return HeaderOptions(self.simple_keys, self.pattern, self.sep, **of_reader)

    def _target_of(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """The dtype that intensities of a dtype are converted to."""
        target = dtype if self._target is None else self._target
        return np.dtype(_WIDER.get(target, target))


def _made_for(kind: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A reader with the arguments that are meant for it; ``LoadImage`` finds out which in this way too."""
    try:
        return kind(*args, **kwargs)
    except TypeError:
        return kind()


class LoadVolumed(LoadImaged):
    """Dictionary version of :class:`LoadVolume`, which fits in the place of MONAI's ``LoadImaged``.

    Args:
        keys: the files.
        reader: MONAI's readers to use, for every file; None: ours for NIfTI, and MONAI's choice for all else.
        dtype: of the result; None keeps what the file's header says.
        meta_keys: where to put the metadata, for ``image_only=False``.
        meta_key_postfix: where to put them if ``meta_keys`` does not say: under ``key_{postfix}``.
        overwriting: whether metadata may overwrite another value there.
        image_only: give the volumes only, not their metadata besides.
        ensure_channel_first: add an axis for channels, or move it to the front.
        simple_keys: keep only the most important metadata.
        prune_meta_pattern: regular expression of metadata keys to leave out.
        prune_meta_sep: separator of nested keys in that pattern.
        allow_missing_keys: leave out keys that an item lacks.
        expanduser: expand ``~`` in file names.
        lazy_read: give volumes of which the patches that are cut later are read and converted only.
        mmap: map uncompressed files into memory for that, instead of reading from them.
        args: for the readers.
        kwargs: for the readers, such as ``channel_dim``.

    Example:
        >>> import tempfile
        >>> import nibabel
        >>> from monai_patchqueue import RandUniformPatchd
        >>> load = LoadVolumed("image", ensure_channel_first=True, lazy_read=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nibabel.save(nibabel.Nifti1Image(np.ones((8, 9, 7), np.int16), np.eye(4)), f"{folder}/a.nii")
        ...     volume = load({"image": f"{folder}/a.nii"})
        ...     patch, = RandUniformPatchd("image", 4)(volume)
        >>> volume["image"]
        LazyMetaTensor(shape=(1, 8, 9, 7), dtype=torch.float32)
        >>> patch["image"].shape, patch["image"].dtype
        (torch.Size([1, 4, 4, 4]), torch.float32)
    """

    def __init__(
        self,
        keys: KeysCollection,
        reader: Any = None,
        dtype: Any = np.float32,
        meta_keys: KeysCollection | None = None,
        meta_key_postfix: str = PostFix.meta(),
        overwriting: bool = False,
        image_only: bool = True,
        ensure_channel_first: bool = False,
        simple_keys: bool = False,
        prune_meta_pattern: str | None = None,
        prune_meta_sep: str = ".",
        allow_missing_keys: bool = False,
        expanduser: bool = True,
        *args: Any,
        lazy_read: bool = False,
        mmap: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            keys,
            meta_keys=meta_keys,
            meta_key_postfix=meta_key_postfix,
            overwriting=overwriting,
            allow_missing_keys=allow_missing_keys,
        )
        self._loader = LoadVolume(
            reader,
            image_only,
            dtype,
            ensure_channel_first,
            simple_keys,
            prune_meta_pattern,
            prune_meta_sep,
            expanduser,
            *args,
            lazy_read=lazy_read,
            mmap=mmap,
            **kwargs,
        )


LoadVolumeD = LoadVolumeDict = LoadVolumed
