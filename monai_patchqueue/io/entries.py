# SPDX-License-Identifier: Apache-2.0
"""A folder of entries that are there whole or not at all, whatever happens to those who write them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

__all__ = ["DamagedEntry", "EntryFolder", "NoRoom"]

MANIFEST = "entry.json"
UNFINISHED = re.compile(r"\.unfinished-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{32}")
OLD_SECONDS = 24 * 3600.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_THERE_ALREADY = (errno.EEXIST, errno.ENOTEMPTY)


class DamagedEntry(OSError):
    """An entry's manifest is not what was written."""


class NoRoom(OSError):
    """The disk is full, or as full as it may be; ``needed`` is how many bytes the entry takes."""

    needed = 0


class EntryFolder:
    """Entries are folders with files and a manifest, which has their sizes and checksums and the entry's content.

    An entry is written under another name, synchronized with the disk and then renamed, so that all who see it see it
    whole: other processes, and those that come after a crash. Of several who write the same entry the first wins.

    Args:
        root: the folder; made with the first entry.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     entries = EntryFolder(Path(root))
        ...     size = entries.write("a", {"age": 40}, {"voxels": b"123"})
        ...     entries.names(), entries.read("a"), entries.damaged("a")
        (['a'], {'age': 40}, [])
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str, file: str = MANIFEST) -> Path:
        """Where an entry's file is."""
        return self.root / name / file

    def __contains__(self, name: str) -> bool:
        return self.path(name).exists()

    def names(self) -> list[str]:
        """The entries that are there."""
        if not self.root.is_dir():
            return []
        return sorted(path.parent.name for path in self.root.glob(f"*/{MANIFEST}") if path.parent.name[0] != ".")

    def write(self, name: str, content: Any, files: Mapping[str, bytes]) -> int:
        """Write an entry, unless it is there.

        Args:
            name: the entry's.
            content: JSON.
            files: names and bytes.

        Returns:
            How many bytes it takes.

        Raises:
            NoRoom: the disk is full. Nothing is left of the entry then, nor after any other error.
        """
        sizes = {file: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for file, data in files.items()}
        body = {"files": sizes, "content": content}
        manifest = json.dumps({**body, "sha256": _digest(body)}).encode()
        total = len(manifest) + sum(map(len, files.values()))
        unfinished = self._unfinished()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            unfinished.mkdir()
            for file, data in {**files, MANIFEST: manifest}.items():
                _write(unfinished / file, data)
            _synchronize(unfinished)
            try:
                os.rename(unfinished, self.root / name)
            except OSError as error:
                if error.errno not in _THERE_ALREADY or name not in self:
                    raise
            _synchronize(self.root)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            full = NoRoom(error.errno, f"{os.strerror(error.errno)}: {total} bytes are needed", str(self.root / name))
            full.needed = total
            raise full from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return total

    def read(self, name: str) -> Any:
        """An entry's content.

        Raises:
            FileNotFoundError: it is not there.
            DamagedEntry: its manifest is not what was written.
        """
        return self._manifest(name)["content"]

    def nbytes(self, name: str) -> int:
        """How many bytes an entry takes."""
        return sum(file.stat().st_size for file in (self.root / name).iterdir())

    def damaged(self, name: str) -> list[Path]:
        """The files of an entry that are missing, or not what was written."""
        try:
            files = self._manifest(name)["files"]
        except (DamagedEntry, FileNotFoundError):
            return [self.path(name)]
        return [self.path(name, file) for file in files if not _is_intact(self.path(name, file), files[file])]

    def remove(self, name: str) -> None:
        """Remove an entry, at once for all who look for it."""
        unfinished = self._unfinished()
        try:
            os.rename(self.root / name, unfinished)
        except FileNotFoundError:
            return
        shutil.rmtree(unfinished, ignore_errors=True)

    def remove_leftovers(self) -> int:
        """Remove what writers left that were ended in the middle; gives the number of bytes that it took.

        A writer on another host counts as ended after a day.
        """
        freed = 0
        for path in self.root.glob(".unfinished-*"):
            owner = UNFINISHED.fullmatch(path.name)
            if owner and not _is_alive(owner["host"], int(owner["pid"]), path):
                freed += sum(file.stat().st_size for file in path.iterdir())
                shutil.rmtree(path, ignore_errors=True)
        return freed

    def _unfinished(self) -> Path:
        return self.root / f".unfinished-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"

    def _manifest(self, name: str) -> dict[str, Any]:
        path = self.path(name)
        try:
            manifest: dict[str, Any] = json.loads(path.read_bytes())
            expected = manifest.pop("sha256")
        except (ValueError, KeyError, AttributeError) as error:
            raise DamagedEntry(f"{str(path)!r} is damaged: it is no manifest any more ({error})") from error
        if _digest(manifest) != expected:
            raise DamagedEntry(f"{str(path)!r} is damaged: it is not what was written")
        return manifest


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _synchronize(folder: Path) -> None:
    """Have a folder's list of names on the disk, where a system lets folders be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _is_intact(path: Path, expected: Mapping[str, Any]) -> bool:
    sha = hashlib.sha256()
    try:
        if path.stat().st_size != expected["bytes"]:
            return False
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                sha.update(piece)
    except OSError:
        return False
    return bool(sha.hexdigest() == expected["sha256"])


def _is_alive(host: str, pid: int, path: Path) -> bool:
    """Whether the process that made a folder may still write it."""
    try:
        made = path.stat().st_mtime
        if host != socket.gethostname():
            return time.time() - made < OLD_SECONDS
        return bool(psutil.Process(pid).create_time() <= made)  # else its number was given to another one
    except FileNotFoundError:
        return True
    except psutil.Error:
        return False
