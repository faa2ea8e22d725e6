# SPDX-License-Identifier: Apache-2.0
"""Decompressing gzip files into memory that is at hand: by isal where it is installed, else by the standard library."""

from __future__ import annotations

import gzip
import zlib
from typing import Any, BinaryIO

isal_zlib: Any
try:
    from isal import isal_zlib
except ImportError:  # the extra "fast" is not installed
    isal_zlib = None

__all__ = ["GzipStream"]

PIECE = 1 << 19
"""Bytes that are read or decompressed at a time: they stay in the cache."""

_ERRORS: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error)
if isal_zlib is not None:
    _ERRORS = (*_ERRORS, isal_zlib.error)


class GzipStream:
    """Reads a gzip file, of one member or several, from its beginning.

    Args:
        file: the compressed file, unbuffered.
        name: what to call it in messages.

    Example:
        >>> import io
        >>> out = bytearray(3)
        >>> GzipStream(io.BytesIO(gzip.compress(b"voxels")), "a.gz").fill(out, "the first half")
        >>> out
        bytearray(b'vox')
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._name = name
        # The raw reader inflates into the caller's buffer; IGzipFile and GzipFile inflate into bytes and copy them.
        reader = getattr(isal_zlib, "_GzipReader", None)
        self._reader: Any = gzip.GzipFile(fileobj=file, mode="rb") if reader is None else reader(file, PIECE)
        self._read = 0

    def fill(self, out: Any, what: str) -> None:
        """Fill a buffer with the bytes that come next.

        Args:
            out: writable, contiguous.
            what: what these bytes are, for messages.

        Raises:
            OSError: the file ends before the buffer is full, or is corrupt.
        """
        view = memoryview(out).cast("B")
        done = 0
        while done < len(view):
            try:
                n = self._reader.readinto(view[done : done + PIECE])
            except _ERRORS as error:
                raise self._broken(
                    f"{error} in {what}, after {self._read + done} bytes of decompressed data"
                ) from error
            if not n:
                raise self._broken(
                    f"the decompressed data end after {self._read + done} bytes, in {what}, of which "
                    f"{len(view)} bytes were expected from byte {self._read} on"
                )
            done += n
        self._read += done

    def finish(self) -> None:
        """Have the checksum compared, if the data end here.

        Raises:
            OSError: the checksum differs or is missing.
        """
        try:
            self._reader.readinto(bytearray(1))
        except _ERRORS as error:
            if isinstance(error, gzip.BadGzipFile) and str(error).startswith("Not a gzipped file"):
                return  # other readers do not look at what follows the data, so it is no reason to refuse them
            raise self._broken(f"{error} at the end of {self._read} bytes of decompressed data") from error

    def _broken(self, found: str) -> OSError:
        return OSError(f"{self._name!r} is truncated or corrupt: {found}; copy or download the file again")
