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
        self._file = file
        self._name = name
        # The raw reader inflates into the caller's buffer; IGzipFile and GzipFile inflate into bytes and copy them.
        fast = getattr(isal_zlib, "_GzipReader", None)
        self._is_fast = fast is not None
        self._reader: Any = gzip.GzipFile(fileobj=file, mode="rb") if fast is None else fast(file, PIECE)
        self._position = 0

    def fill(self, out: Any, what: str) -> None:
        """Fill a buffer with the bytes that come next.

        Args:
            out: writable, contiguous.
            what: what these bytes are, for messages.

        Raises:
            OSError: the file ends before the buffer is full, or is corrupt.
        """
        view = memoryview(out).cast("B")
        first = self._position
        while self._position < first + len(view):
            done = self._position - first
            n = self._inflate(view[done : done + PIECE], f"in {what}")
            if not n:
                raise self._broken(
                    f"the decompressed data end after {self._position} bytes, in {what}, of which {len(view)} bytes "
                    f"were expected from byte {first} on"
                )
            self._position += n

    def finish(self) -> None:
        """Have the checksum compared, if the data end here.

        Raises:
            OSError: the checksum differs or is missing.
        """
        try:
            self._inflate(memoryview(bytearray(1)), "at the end of the voxels")
        except OSError as error:
            # Other readers do not look at what follows a member, so it is no reason to refuse the file.
            if not str(error.__cause__).startswith("Not a gzipped file"):
                raise

    def _inflate(self, view: memoryview, where: str) -> int:
        try:
            return int(self._reader.readinto(view))
        except _ERRORS as error:
            if self._is_fast:
                # It fails without giving the bytes before the fault, so the standard library has the last word.
                self._is_fast = False
                self._file.seek(0)
                self._reader = gzip.GzipFile(fileobj=self._file, mode="rb")
                self._skip(self._position, where)
                return self._inflate(view, where)
            raise self._broken(f"{error} {where}, after {self._position} bytes of decompressed data") from error

    def _skip(self, n: int, where: str) -> None:
        scratch = memoryview(bytearray(PIECE))
        while n and (done := self._inflate(scratch[:n], where)):
            n -= done

    def _broken(self, found: str) -> OSError:
        return OSError(f"{self._name!r} is truncated or corrupt: {found}; copy or download the file again")
