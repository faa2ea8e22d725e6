# SPDX-License-Identifier: Apache-2.0
"""Data that is given as a folder, or as records of which some are left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import Dataset as MonaiDataset
from monai.transforms import Compose, Transform
from torch.utils.data import Dataset

from ..io.zarr_arrays import is_zarr

__all__ = ["as_dataset"]

_SAVED = (".pt", ".pth")


def as_dataset(
    data: Sequence[Any] | Dataset[Any] | str | os.PathLike[str],
    transform: Callable[[Any], Any] | None = None,
    filter_fn: Callable[[Any], bool] | None = None,
) -> Dataset[Any]:
    """A map-style dataset of ``data``.

    Args:
        data: a dataset; a list of records; or a folder, whose files (but hidden ones) and Zarr stores, those of folders
            in it included, are taken in the order of their names. A file's record is ``{"image": path}``; a ``.pt``
            file holds a dictionary that was saved by ``torch.save``, and is loaded with ``weights_only=True``.
        transform: applied to each record.
        filter_fn: which records to take; for a folder, which ``pathlib.Path``.

    Raises:
        TypeError: data of another kind.
        ValueError: a folder that is not there; nothing to take; arguments that don't go together.
    """
    if isinstance(data, (str, os.PathLike)):
        return _of_folder(Path(data), transform, filter_fn)
    if isinstance(data, Dataset):
        for name, value in (("transform", transform), ("filter_fn", filter_fn)):
            if value is not None:
                raise ValueError(f"data is a dataset of its own: pass {name} only with a list of records or a folder.")
        return data
    if not isinstance(data, Sequence):
        raise TypeError(f"data is a {type(data).__name__}; expected a list of records, a dataset or a folder.")
    records = [record for record in data if filter_fn is None or filter_fn(record)]
    if data and not records:
        raise ValueError(f"filter_fn leaves none of {len(data)} records.")
    dataset: Dataset[Any] = MonaiDataset(records, transform)
    return dataset


def _of_folder(
    folder: Path, transform: Callable[[Any], Any] | None, filter_fn: Callable[[Path], bool] | None
) -> Dataset[Any]:
    if not folder.is_dir():
        raise ValueError(f"data={str(folder)!r} is no folder.")
    files = [path for path in sorted(folder.rglob("*")) if _is_item(path, path.relative_to(folder))]
    taken = [path for path in files if filter_fn is None or filter_fn(path)]
    if not taken:
        raise ValueError(f"{folder} holds {len(files)} files, of which filter_fn takes none: there is nothing to load.")
    others = [path for path in taken if path.suffix not in _SAVED]
    if others and transform is None:
        raise ValueError(
            f"{others[0]} is no .pt file: pass a transform that loads it from {{'image': path}}, such as "
            "LoadImaged('image'), or a filter_fn that leaves it out."
        )
    steps = [_LoadSavedItem(), *([] if transform is None else [transform])]
    dataset: Dataset[Any] = MonaiDataset([{"image": str(path)} for path in taken], Compose(steps))
    return dataset


def _is_item(path: Path, inside: Path) -> bool:
    """Whether a path is a file that is not hidden, or a Zarr store, whose own files are not taken."""
    if any(part.startswith(".") for part in inside.parts) or is_zarr(inside.parent):
        return False
    return path.is_file() or is_zarr(inside)


class _LoadSavedItem(Transform):
    """Load the dictionary that a ``.pt`` file holds; records of other files pass."""

    def __call__(self, record: Mapping[str, str]) -> Any:
        path = record["image"]
        if not path.endswith(_SAVED):
            return record
        item = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(item, Mapping):
            raise TypeError(f"{path} holds a {type(item).__name__}; expected a dictionary.")
        return dict(item)
