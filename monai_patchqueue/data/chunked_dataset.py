# SPDX-License-Identifier: Apache-2.0
"""A dataset whose volumes are prepared once, and of which patches are read from then on."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

from monai.data import PersistentDataset, get_track_meta
from monai.transforms import Transform, reset_ops_id
from monai.transforms.traits import RandomizableTrait
from tqdm import tqdm

from ..io.chunks import library
from ..io.entries import DamagedEntry, EntryFolder, NoRoom
from ..io.stored import StoredItems, StoredVolume
from ..queue.memory import format_bytes
from ..transforms import PatchTransform, PatchTransformd, ReusableIndex
from .fingerprint import CHECKS, Check, file_state, fingerprint
from .volumes import volume_name

__all__ = ["ChunkedDataset"]

logger = logging.getLogger(__name__)

FORMAT = 1
"""Counts changes of what is in an entry."""


class ChunkedDataset(PersistentDataset):
    """Keeps each volume, as it is before the first random transform, in chunks; patches read those that they touch.

    After MONAI's ``PersistentDataset``: the transforms before the first random one are applied once, and the others at
    each access. No volume is read or held whole where the first of these is a patch transform of this package, or where
    what comes before the patches are cut commutes with that (see :class:`LazyMetaTensor`). Patches are, to the bit,
    those that ``PersistentDataset(track_meta=True)`` gives.

    Volumes are prepared when they are first asked for, or all of them by :meth:`prepare`. What is stored is for these
    transforms (their classes, parameters and code) and these files (their names, sizes and times): what has changed is
    prepared again. Entries are written beside and renamed, so that writers may work at the same time, and may end at
    any time. Reading them runs no code: they are JSON and compressed arrays.

    Needs the extra ``store`` (blosc2).

    Args:
        data: records, such as MONAI's list of dictionaries with paths.
        transform: transforms; those before the first random one must give the same at each time.
        cache_dir: folder of the store, which datasets may share; made if it is not there.
        chunk_shape: chunks along the spatial axes, one size for all or one for each; None: 64 along each of three,
            which was measured to suit random patches of 64 to 96 voxels a side.
        mmap: map files into memory instead of reading from them. Faster where they are in the system's cache or on a
            network drive; slower on a cold local disk.
        check: by what files are seen to have changed: ``"mtime"``, their time of change, or ``"content"``, a hash of
            all of their bytes, which takes as long as reading them.
        version: counts as part of the transforms; change it where they change by what cannot be seen, such as a file
            that they read.

    Raises:
        ImportError: blosc2 is missing.
        TypeError: a transform does not show its parameters.
        ValueError: the first transform is random, or an argument has an impossible value.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from monai.transforms import Compose, ScaleIntensityd
        >>> from monai_patchqueue import RandUniformPatchd
        >>> transform = Compose([ScaleIntensityd("image"), RandUniformPatchd("image", 8, num_samples=2)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dataset = ChunkedDataset([{"image": np.random.rand(1, 40, 40, 40)}], transform, folder)
        ...     dataset.prepare(progress=False)
        ...     [patch["image"].shape for patch in dataset[0]]
        [torch.Size([1, 8, 8, 8]), torch.Size([1, 8, 8, 8])]
    """

    def __init__(
        self,
        data: Sequence[Any],
        transform: Sequence[Callable[..., Any]] | Callable[..., Any],
        cache_dir: Path | str,
        *,
        chunk_shape: int | Sequence[int] | None = None,
        mmap: bool = True,
        check: Check = "mtime",
        version: str = "",
    ) -> None:
        library()
        if check not in CHECKS:
            raise ValueError(f"check must be one of {', '.join(map(repr, CHECKS))}, got {check!r}")
        chunk = chunk_shape if chunk_shape is None or isinstance(chunk_shape, int) else tuple(chunk_shape)
        sizes = chunk if isinstance(chunk, tuple) else (1 if chunk is None else chunk,)
        if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"chunk_shape must be a positive int, or one for each spatial axis, got {chunk_shape!r}")
        super().__init__(data, transform, Path(cache_dir).expanduser())
        self.chunk_shape = chunk_shape
        self.mmap = mmap
        self.check = check
        self.version = version
        transforms = self.transform.transforms
        self._split = next((i for i, t in enumerate(transforms) if _ends_preparation(t)), len(transforms))
        if self._split == 0:
            found = f"the first transform, {type(transforms[0]).__name__}, is random" if transforms else "no transform"
            raise ValueError(
                f"there is nothing to prepare ({found}): put transforms that give the same at each time first, or take "
                "monai.data.Dataset"
            )
        recipe = self.transform
        composed = (recipe.lazy, recipe.overrides, recipe.map_items, recipe.unpack_items, transforms[: self._split])
        self._pipeline = fingerprint(FORMAT, version, chunk, get_track_meta(), composed)[:16]
        self._items = StoredItems(EntryFolder(Path(self.cache_dir)), chunk, mmap)
        self._names: dict[int, str] = {}

    def prepare(self, num_workers: int = 1, progress: bool = True) -> None:
        """Prepare the volumes that are not stored yet, and the indices that the patch transform needs of each.

        Once the first is stored, what all of them will take is logged; where that is more than the disk has left, there
        is a warning.

        Args:
            num_workers: threads that prepare one volume each.
            progress: show a bar.

        Raises:
            OSError: the disk is full. What was stored so far stays.
        """
        folder = self._items.folder
        missing = [i for i in range(len(self)) if self._name(i) not in folder]
        there = sorted({*range(len(self))} - {*missing})
        with (
            tqdm(total=len(self), desc="preparing volumes", unit="volume", disable=not progress) as bar,
            ThreadPoolExecutor(max(1, num_workers)) as pool,
        ):
            for batch in (missing[:1], [*missing[1:], *there]):
                tasks = [pool.submit(self._make_ready, i) for i in batch]
                try:
                    for task in tasks:
                        task.result()
                        bar.update()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
                if missing and batch == missing[:1]:
                    self._announce(len(missing) - 1)

    def estimate_bytes(self) -> int:
        """How much disk all volumes take once prepared, going by those that are; if none is, one is prepared."""
        folder = self._items.folder
        names = [self._name(i) for i in range(len(self))]
        if not any(name in folder for name in names) and names:
            self._prepare(0)
        stored = [folder.nbytes(name) for name in names if name in folder]
        return round(sum(stored) / max(1, len(stored)) * len(names))

    def verify(self, remove: bool = False, progress: bool = True) -> list[Path]:
        """Compare the stored files of this dataset with the checksums that were taken when they were written.

        Args:
            remove: remove the entries that are damaged, so that they are prepared again.
            progress: show a bar.

        Returns:
            The files that are damaged or missing, of volumes that have been prepared.
        """
        folder = self._items.folder
        used = {self._name(i) for i in range(len(self))}
        entries = [name for name in folder.names() if _volume_of(name) in used]
        damaged: list[Path] = []
        for name in tqdm(entries, desc="verifying", unit="entry", disable=not progress):
            found = folder.damaged(name)
            damaged += found
            if found and remove:
                folder.remove(name)
        for path in damaged:
            logger.error("%s is damaged%s", path, " and is removed" if remove else "")
        return damaged

    def gc(self, *others: ChunkedDataset, keep_other_pipelines: bool = False) -> int:
        """Remove what the present data and transforms no longer use, and what writers left that ended in the middle.

        Args:
            others: datasets with the same ``cache_dir`` whose entries stay, such as that of the validation.
            keep_other_pipelines: keep what was prepared by other transforms, too: of others' experiments, or of an
                earlier version of these.

        Returns:
            How many bytes were freed.
        """
        folder = self._items.folder
        used = {dataset._name(i) for dataset in (self, *others) for i in range(len(dataset))}
        freed = folder.remove_leftovers()
        for name in folder.names():
            if _volume_of(name) in used or (keep_other_pipelines and not name.startswith(f"{self._pipeline}-")):
                continue
            freed += folder.nbytes(name)
            folder.remove(name)
        return freed

    def set_data(self, data: Sequence[Any]) -> None:
        """Take other records. What is stored stays; :meth:`gc` removes what is no longer used."""
        self.data = data
        self._names = {}

    def _transform(self, index: int) -> Any:
        item = self._hand_out(self._stored(index))
        return item if self._split == len(self.transform.transforms) else self.transform(item, start=self._split)

    def _name(self, index: int) -> str:
        """The name of a volume's entry, found once: its files are not looked at again in this process."""
        if index not in self._names:
            record = self.data[index]
            self._names[index] = f"{self._pipeline}-{fingerprint(record, file_state(record, self.check))[:32]}"
        return self._names[index]

    def _stored(self, index: int) -> Any:
        """An item with stored volumes, which is prepared if it is not there."""
        name = self._name(index)
        if name not in self._items.folder:
            self._prepare(index)
        try:
            return self._items.read(name)
        except (DamagedEntry, FileNotFoundError) as error:
            logger.warning("%s is prepared again: %s", volume_name(self, index), error)
            self._items.folder.remove(name)
            self._prepare(index)
            return self._items.read(name)

    def _prepare(self, index: int) -> None:
        item = self.transform(deepcopy(self.data[index]), end=self._split, threading=True)
        reset_ops_id(item)
        try:
            self._items.write(self._name(index), _without_indices(item))
        except NoRoom as error:
            free = format_bytes(shutil.disk_usage(self.cache_dir).free)
            raise OSError(
                error.errno,
                f"no room for {volume_name(self, index)}: it takes {format_bytes(error.needed)}, {free} are free, and "
                f"{sum(self._name(i) not in self._items.folder for i in range(len(self)))} of {len(self)} volumes are "
                "not stored yet. Make room, take another cache_dir, or remove what is no longer used by gc()",
                str(self.cache_dir),
            ) from error
        except (TypeError, ValueError) as error:
            raise type(error)(f"{volume_name(self, index)} cannot be stored: {error}") from error

    def _make_ready(self, index: int) -> None:
        item = self._stored(index)
        patches = self._patches()
        if isinstance(patches, PatchTransformd):
            patches.make_ready(item)

    def _patches(self) -> Any:
        """The first transform that is not applied before storing, if it takes patches."""
        rest = self.transform.transforms[self._split :]
        return rest[0] if rest and isinstance(rest[0], PatchTransformd | PatchTransform) else None

    def _hand_out(self, item: Any) -> Any:
        """An item for the transforms that follow: with stored volumes where they take patches, else with tensors."""
        patches = self._patches()
        if isinstance(patches, PatchTransformd) and isinstance(item, dict):
            cut = [item[key] for key in patches.keys if isinstance(item.get(key), StoredVolume)]
            shapes = {volume.shape[1:] for volume in cut}
            return {key: v if getattr(v, "shape", (0,))[1:] in shapes else _loaded(v) for key, v in item.items()}
        if isinstance(patches, PatchTransform):
            return item
        return _loaded(item, lazily=self._split < len(self.transform.transforms))

    def _announce(self, missing: int) -> None:
        expected = self.estimate_bytes()
        free = shutil.disk_usage(self.cache_dir).free
        logger.info("the %d volumes take about %s in %s", len(self), format_bytes(expected), self.cache_dir)
        needed = expected / max(1, len(self)) * missing
        if needed > free:
            logger.warning(
                "%d more need about %s, and %s has %s left",
                missing,
                format_bytes(needed),
                self.cache_dir,
                format_bytes(free),
            )


def _ends_preparation(transform: Any) -> bool:
    """Whether a transform is applied at each access: it is random, takes patches, or does not say that it is not."""
    kinds = (RandomizableTrait, PatchTransform, PatchTransformd)
    return isinstance(transform, kinds) or not isinstance(transform, Transform)


def _volume_of(entry: str) -> str:
    """The volume's entry that an entry belongs to: indices are named after it."""
    return entry.split(".", 1)[0]


def _loaded(value: Any, lazily: bool = False) -> Any:
    """An item with the volumes that it was stored with, read now or where something needs them."""
    if isinstance(value, StoredVolume):
        return value.lazily() if lazily else value.load()
    if isinstance(value, dict):
        return {key: _loaded(v, lazily) for key, v in value.items()}
    return type(value)(_loaded(v, lazily) for v in value) if type(value) in (list, tuple) else value


def _without_indices(value: Any) -> Any:
    """An item without the indices of :class:`LabelIndexd` and its like: they belong to tensors in memory."""
    if isinstance(value, Mapping):
        return {key: _without_indices(v) for key, v in value.items() if not isinstance(v, ReusableIndex)}
    return value
