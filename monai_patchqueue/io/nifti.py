# SPDX-License-Identifier: Apache-2.0
"""NIfTI files: headers by nibabel, voxels straight from the file."""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.fileholders import FileHolder
from nibabel.spatialimages import HeaderDataError

from .inflate import PIECE, GzipStream
from .regions import StoredFile, check_length, fill_from
from .reused_memory import decompressed
from .scaling import Scaling, pieces

__all__ = ["NiftiVoxels", "is_nifti", "nifti_files", "open_nifti"]

SINGLE = {348: (nib.Nifti1Image, 344, b"n+1"), 540: (nib.Nifti2Image, 4, b"n+2")}
"""Size of the header → class, place of the magic number, and the magic number."""
PAIR = {348: (nib.Nifti1Pair, 344, b"ni1"), 540: (nib.Nifti2Pair, 4, b"ni2")}

MAX_INFLATION = 1032
"""A compressed byte gives no more bytes than these: what deflate is able to."""


class NiftiVoxels:
    """The voxels of a NIfTI file: an array-like that reads them when they are asked for.

    It stands in for nibabel's proxy in an image's ``dataobj``.

    Args:
        file: the file that has the voxels.
        compressed: whether it is a gzip file.
        offset: where they begin, in bytes.
        shape: the volume's shape, in the file's order of axes, of which the first is the fastest.
        stored: dtype in the file.
        scaling: from stored numbers to intensities.
    """

    is_proxy = True

    def __init__(
        self, file: str, compressed: bool, offset: int, shape: tuple[int, ...], stored: np.dtype[Any], scaling: Scaling
    ) -> None:
        self.file = file
        self.compressed = compressed
        self.offset = offset
        self.shape = shape
        self.stored_dtype = stored
        self.scaling = scaling

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the intensities."""
        return self.scaling.result_dtype(self.stored_dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read(self.scaling if dtype is None else self.converted_to(dtype))

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]

    def converted_to(self, dtype: Any) -> Scaling:
        """The scaling, followed by a cast."""
        return Scaling(self.scaling.slope, self.scaling.inter, None if dtype is None else np.dtype(dtype))

    def reshaped(self, shape: tuple[int, ...]) -> NiftiVoxels:
        """The same voxels, without some of the axes of length 1."""
        return NiftiVoxels(self.file, self.compressed, self.offset, shape, self.stored_dtype, self.scaling)

    def read(self, scaling: Scaling, out: np.ndarray | None = None) -> np.ndarray:
        """The whole volume, converted, in the file's order of axes (Fortran's).

        The file is read, decompressed and converted piece by piece, so that memory is passed over once.

        Args:
            scaling: what to do to the numbers.
            out: where to put them, of one axis; new memory by default.

        Raises:
            OSError: the file is truncated or corrupt.
        """
        count = math.prod(self.shape)
        target = scaling.result_dtype(self.stored_dtype)
        with open(self.file, "rb", buffering=0) as file:
            fill, finish = self._source(file)
            out = np.empty(count, target) if out is None else out
            if scaling.is_identity and target == self.stored_dtype:
                fill(out)
            else:
                step = PIECE // self.stored_dtype.itemsize
                scratch = np.empty(min(step, count), self.stored_dtype)
                for piece in pieces(count, step):
                    stored = scratch[: piece.stop - piece.start]
                    fill(stored)
                    scaling.into(out[piece], stored)
            finish()
        return out.reshape(self.shape, order="F")

    def regions(self, mmap: bool) -> StoredFile | np.ndarray:
        """What regions of the stored numbers can be read from: the file, or all of them in memory if compressed."""
        if self.compressed:
            out = decompressed.take(math.prod(self.shape), self.stored_dtype)
            return self.read(Scaling(dtype=self.stored_dtype), out)
        return StoredFile(self.file, self.offset, self.shape, self.stored_dtype, "F", mmap)

    def _source(self, file: BinaryIO) -> tuple[Callable[[np.ndarray], None], Callable[[], None]]:
        """Fills arrays with the voxels that come next; and what to call at the end."""
        nbytes = math.prod(self.shape) * self.stored_dtype.itemsize
        if not self.compressed:
            check_length(self.file, self.offset, self.shape, self.stored_dtype)
            file.seek(self.offset)
            return (lambda out: fill_from(file, out, self.file)), (lambda: None)
        packed = os.path.getsize(self.file)
        if nbytes > packed * MAX_INFLATION:
            raise OSError(
                f"{self.file!r} is truncated or corrupt: its header says shape {list(self.shape)} and dtype "
                f"{self.stored_dtype}, which are {nbytes} bytes; its {packed} bytes cannot hold them"
            )
        stream = GzipStream(file, self.file)
        stream.fill(bytearray(self.offset), "the header")
        what = f"voxels of shape {list(self.shape)} and dtype {self.stored_dtype}"
        return (lambda out: stream.fill(out.view(np.uint8), what)), stream.finish


def is_nifti(file: str) -> bool:
    """Whether a file's name is one that :func:`open_nifti` may know: .nii, .nii.gz, .hdr, .img."""
    return file.lower().endswith((".nii", ".nii.gz", ".hdr", ".img"))


def nifti_files(file: str) -> tuple[str, str]:
    """The files that have the header and the voxels: two if one of a .hdr and .img pair is given, else the file itself.

    >>> nifti_files("a.nii"), nifti_files("a.img")
    (('a.nii', 'a.nii'), ('a.hdr', 'a.img'))
    """
    lower = file.lower()
    header = file[:-4] + (".HDR" if file.endswith(".IMG") else ".hdr") if lower.endswith(".img") else file
    voxels = file[:-4] + (".IMG" if file.endswith(".HDR") else ".img") if lower.endswith(".hdr") else file
    return header, voxels


def open_nifti(file: str) -> Any | None:
    """A nibabel image whose ``dataobj`` is :class:`NiftiVoxels`; only the header is read here.

    Args:
        file: .nii, .nii.gz, or one of a .hdr and .img pair.

    Returns:
        None for what nibabel had better read: other formats, and voxels that are no plain integers or floats.

    Raises:
        OSError: the file cannot be read, or ends within the header.

    Example:
        >>> open_nifti("image.png") is None
        True
    """
    if not is_nifti(file):
        return None
    compressed = file.lower().endswith(".gz")
    header_file, voxel_file = nifti_files(file)
    if not (os.path.exists(header_file) and os.path.exists(voxel_file)):
        return None
    header = _read_header(header_file, compressed, paired=header_file != voxel_file)
    if header is None:
        return None
    head, kind = header
    try:
        holder = FileHolder(fileobj=io.BytesIO(head))
        by_nibabel: Any = kind.from_file_map({"header": holder, "image": holder})
    except (HeaderDataError, ValueError):
        return None
    proxy = by_nibabel.dataobj
    plain = proxy.dtype.kind in "iuf" and proxy.dtype.itemsize <= 8 and math.prod(proxy.shape) > 0 and proxy.shape
    usual = np.isfinite(by_nibabel.affine).all() and (header_file != voxel_file or proxy.offset == len(head))
    if not plain or not usual:
        return None
    scaling = Scaling(float(proxy.slope), float(proxy.inter))
    voxels = NiftiVoxels(voxel_file, compressed, proxy.offset, tuple(proxy.shape), proxy.dtype, scaling)
    return kind(voxels, by_nibabel.affine, by_nibabel.header)


def _read_header(file: str, compressed: bool, paired: bool) -> tuple[bytes, Any] | None:
    """The bytes before the voxels, and the class of image that they belong to; None if it is not NIfTI."""
    with open(file, "rb", buffering=0) as raw:
        stream = GzipStream(raw, file) if compressed else None

        def read(n: int) -> bytes:
            if stream is None:
                return raw.read(n) or b""
            out = bytearray(n)
            stream.fill(out, "the header")
            return bytes(out)

        head = read(348)
        for endian in "<>":
            size = struct.unpack(endian + "i", head[:4])[0] if len(head) == 348 else 0
            if size not in SINGLE:
                continue
            kind, at, magic = (PAIR if paired else SINGLE)[size]
            if head[at : at + 3] != magic:
                return None
            if paired:
                return head + raw.read(), kind
            (offset,) = (
                struct.unpack_from(endian + "f", head, 108)
                if size == 348
                else struct.unpack_from(endian + "q", head, 168)
            )
            if not size + 4 <= offset < 1 << 31:
                return None
            return head + read(int(offset) - len(head)), kind
    return None
