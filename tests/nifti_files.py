# SPDX-License-Identifier: Apache-2.0
"""NIfTI files for tests, byte by byte, so that every header can be written; and comparing what is read of them."""

from __future__ import annotations

import gzip
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

AFFINE = np.array([[0, -2, 0, 10], [1.5, 0, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1.0]])
"""Axes swapped, one of them flipped, voxels of 1.5 x 2 x 3 mm."""

DTYPES = ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]


def voxels(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Random numbers from the dtype's range."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return (rng.standard_normal(shape) * 100).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, np.dtype(dtype).newbyteorder("="), endpoint=True).astype(dtype)


def write_nifti(
    file: Path | str,
    array: np.ndarray,
    *,
    endian: str = "<",
    slope: float = math.nan,
    inter: float = 0,
    sform: int = 1,
    qform: int = 1,
    affine: np.ndarray = AFFINE,
    zooms: tuple[float, ...] | None = None,
    units: tuple[str, str] = ("mm", "sec"),
    version: int = 1,
    extension: bytes = b"",
) -> str:
    """Write .nii, .nii.gz, or .img with its .hdr; the numbers are stored as they are."""
    path = str(file)
    paired = path.endswith(".img")
    kind = {
        (1, False): nib.Nifti1Header,
        (1, True): nib.nifti1.Nifti1PairHeader,
        (2, False): nib.Nifti2Header,
        (2, True): nib.nifti2.Nifti2PairHeader,
    }[version, paired]
    header = kind(endianness=endian)
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_zooms(zooms or (1.5, 2, 3, 2.5, 1, 1, 1)[: array.ndim])
    header.set_qform(affine, qform)
    if sform:
        header.set_sform(affine, sform)
    header.set_xyzt_units(*units)
    header["scl_slope"], header["scl_inter"] = slope, inter
    start = b"\0\0\0\0"
    if extension:
        size = 16 * math.ceil((len(extension) + 8) / 16)
        start = b"\1\0\0\0" + np.array([size, 6], endian + "i4").tobytes() + extension.ljust(size - 8, b"\0")
    if not paired:
        header["vox_offset"] = header.sizeof_hdr + len(start)
    data = array.astype(array.dtype.newbyteorder(endian)).tobytes(order="F")
    if paired:
        Path(path).write_bytes(data)
        Path(path).with_suffix(".hdr").write_bytes(header.binaryblock + start)
    else:
        content = header.binaryblock + start + data
        Path(path).write_bytes(gzip.compress(content, 1) if path.endswith(".gz") else content)
    return path


def assert_same_volume(ours: Any, stock: Any) -> None:
    """Same type, values, dtype, affine and metadata."""
    assert type(ours) is type(stock)
    assert ours.dtype == stock.dtype
    assert ours.shape == stock.shape
    plain = [torch.as_tensor(v).as_subclass(torch.Tensor) for v in (ours, stock)]
    torch.testing.assert_close(*plain, rtol=0, atol=0, equal_nan=True)
    if isinstance(stock, MetaTensor):
        assert_same_meta(ours.meta, stock.meta)
        assert_same_meta(ours.applied_operations, stock.applied_operations)


def assert_same_meta(ours: Any, stock: Any) -> None:
    """Same keys in the same order, types and values."""
    assert type(ours) is type(stock)
    if isinstance(stock, Mapping):
        assert list(ours) == list(stock)
        for key in stock:
            assert_same_meta(ours[key], stock[key])
    elif isinstance(stock, list):
        assert len(ours) == len(stock)
        for pair in zip(ours, stock, strict=True):
            assert_same_meta(*pair)
    elif isinstance(stock, (np.ndarray, torch.Tensor)):
        assert ours.dtype == stock.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(stock))
    else:
        assert ours == stock or (isinstance(stock, float) and math.isnan(stock) and math.isnan(ours))
