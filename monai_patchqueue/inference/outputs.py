# SPDX-License-Identifier: Apache-2.0
"""Where finished volumes lie: in memory, in a memory-mapped .npy or NIfTI file, or in a zarr array."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import MetaKeys

from ..io.lazy import LazyVolume
from ..io.lazy_meta_tensor import LazyMetaTensor
from ..io.scaling import Scaling
from ..io.zarr_arrays import ZarrArray, import_zarr

__all__ = ["FORMATS", "MemoryOutput", "NiftiOutput", "NpyOutput", "Output", "ZarrOutput"]

Meta = dict[Any, Any]
_NIFTI_OFFSET = 352


class Output(Protocol):
    """Takes rows as they are done, and gives the volume at last."""

    def write(self, first: int, stop: int, rows: torch.Tensor) -> None:
        """Rows of shape [C, rows, *other axes], of the output's dtype."""

    def volume(self, meta: Meta) -> Any:
        """The whole volume, of shape [C, *spatial], with its metadata."""


class MemoryOutput:
    """A tensor.

    Args:
        shape: [C, *spatial].
        dtype: of the values.
        device: where it lies.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._values = torch.empty(shape, dtype=dtype, device=device)

    def write(self, first: int, stop: int, rows: torch.Tensor) -> None:
        """Keep finished rows."""
        self._values[:, first:stop] = rows

    def volume(self, meta: Meta) -> MetaTensor:
        """The volume in memory."""
        return MetaTensor(self._values, meta=meta)


class _MappedOutput:
    """A file that is mapped into memory."""

    def __init__(self, file: Path, mapped: np.memmap[Any, Any], values: np.ndarray[Any, Any]) -> None:
        self._file = file
        self._mapped = mapped
        self._values = values  # the same, with channels first

    def write(self, first: int, stop: int, rows: torch.Tensor) -> None:
        """Write finished rows into the file."""
        self._values[:, first:stop] = rows.cpu().numpy()

    def volume(self, meta: Meta) -> MetaTensor:
        """The volume, whose voxels are read from the file when they are used."""
        self._mapped.flush()
        return MetaTensor(torch.from_numpy(self._values), meta={**meta, MetaKeys.SAVED_TO: str(self._file)})


class NpyOutput(_MappedOutput):
    """A .npy file.

    Args:
        file: to be written; its folder is made.
        shape: [C, *spatial].
        dtype: of the values.
        affine: of no use here.
    """

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: torch.dtype, affine: torch.Tensor) -> None:
        _make_way(file)
        mapped = np.lib.format.open_memmap(file, mode="w+", dtype=_numpy_dtype(dtype), shape=shape)
        super().__init__(file, mapped, mapped)


class NiftiOutput(_MappedOutput):
    """An uncompressed .nii file; several channels are its fourth axis or the one after, as MONAI's writers have it.

    Args:
        file: to be written; its folder is made.
        shape: [C, *spatial].
        dtype: of the values.
        affine: float64 of shape [4, 4].
    """

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: torch.dtype, affine: torch.Tensor) -> None:
        _make_way(file)
        channels, *spatial = shape
        stored = (*spatial, *[1] * (3 - len(spatial)), *([channels] if channels > 1 else []))
        image = nib.Nifti1Image(np.broadcast_to(np.zeros((), _numpy_dtype(dtype)), stored), affine.numpy())
        image.header.set_xyzt_units("mm")
        image.header["vox_offset"] = _NIFTI_OFFSET
        file.write_bytes(image.header.binaryblock.ljust(_NIFTI_OFFSET, b"\0"))
        mapped = np.memmap(file, _numpy_dtype(dtype), "r+", _NIFTI_OFFSET, stored, "F")
        super().__init__(file, mapped, np.moveaxis(mapped.reshape((*spatial, channels), order="F"), -1, 0))


class ZarrOutput:
    """A zarr array, in chunks of a channel and 64 voxels along each axis, which ``LoadVolumed`` reads.

    The affine is among its attributes, and its axes are named c, x, y, z.

    Args:
        file: the array's folder.
        shape: [C, *spatial].
        dtype: of the values.
        affine: float64 of shape [4, 4].
    """

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: torch.dtype, affine: torch.Tensor) -> None:
        zarr = import_zarr()
        self._file = file
        chunks = (1, *(min(n, 64) for n in shape[1:]))
        names = [*"cxyz", *(f"axis_{axis}" for axis in range(4, len(shape)))][: len(shape)]
        named = {} if zarr.__version__.startswith("2.") else {"dimension_names": names}
        self._values = zarr.open_array(
            str(file), mode="w", shape=shape, chunks=chunks, dtype=_numpy_dtype(dtype).name, fill_value=0, **named
        )
        self._values.attrs["affine"] = affine.tolist()
        if not named:
            self._values.attrs["_ARRAY_DIMENSIONS"] = names  # as xarray does in Zarr's format 2

    def write(self, first: int, stop: int, rows: torch.Tensor) -> None:
        """Write finished rows into their chunks."""
        self._values[:, first:stop] = rows.cpu().numpy()

    def volume(self, meta: Meta) -> LazyMetaTensor:
        """The volume, of which the parts that are asked for are read."""
        stored = ZarrArray(str(self._file), self._values, range(len(self._values.shape)))
        meta = {**meta, MetaKeys.SAVED_TO: str(self._file)}
        return LazyMetaTensor.of(LazyVolume(stored, Scaling(), meta, channel_axis=0))


FORMATS: dict[str, Callable[[Path, tuple[int, ...], torch.dtype, torch.Tensor], Output]] = {
    "npy": NpyOutput,
    "nii": NiftiOutput,
    "zarr": ZarrOutput,
}


def _make_way(file: Path) -> None:
    """Make a file's folder; an older volume that is still mapped keeps its file, under no name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    try:
        return np.dtype(torch.empty(0, dtype=dtype).numpy().dtype)
    except TypeError:
        raise ValueError(f"files have no dtype for {dtype}: give another dtype, for instance torch.float32.") from None
