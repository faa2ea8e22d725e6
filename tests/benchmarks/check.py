# SPDX-License-Identifier: Apache-2.0
"""Is what a contestant delivers what the stock MONAI pipeline would have cut from the same place?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor, decollate_batch
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from .pipelines import KEYS
from .setup import CLASS_PROBABILITIES, Setup


class Delivered(NamedTuple):
    """One key of one patch, with what the contestant says about it."""

    data: torch.Tensor
    affine: np.ndarray
    path: str
    recorded_start: tuple[int, ...] | None


def unpack_monai(batch: Mapping[str, Any]) -> Iterator[dict[str, Delivered]]:
    """Patches of a batch that MONAI's collation made."""
    for item in decollate_batch(batch):
        yield {key: _from_metatensor(item[key]) for key in KEYS}


def unpack_torchio(batch: Mapping[str, Any]) -> Iterator[dict[str, Delivered]]:
    """Patches of a batch of TorchIO's SubjectsLoader; ``location`` holds start and stop per axis."""
    for number, location in enumerate(batch["location"]):
        start = tuple(int(value) for value in location[:3])
        yield {
            key: Delivered(
                batch[key][number],
                np.asarray(batch["meta"][key]["affine"][number]),
                str(batch["meta"][key]["path"][number]),
                start,
            )
            for key in KEYS
        }


def check_delivery(loader: Iterable[Mapping[str, Any]], unpack: Any, setup: Setup) -> dict[str, Any]:
    """Take one epoch apart: raise AssertionError for a patch that isn't the stock pipeline's, count the rest.

    Returns:
        ``patches`` and ``exact_epoch`` (each volume gave its number of patches).
    """
    reference = _Reference(setup)
    drawn: list[str] = []
    for batch in loader:
        drawn.extend(reference.check(patch) for patch in unpack(batch))
    counts = Counter(drawn)
    expected = {item["image"]: setup.samples_per_volume for item in setup.items}
    return {"patches": len(drawn), "exact_epoch": dict(counts) == expected}


class _Reference:
    """The volumes as the stock pipeline loads them."""

    def __init__(self, setup: Setup) -> None:
        self.patch_size = setup.patch_size
        self.items = {item["image"]: dict(item) for item in setup.items}
        self.load = lru_cache(maxsize=16)(self._load)

    def _load(self, image_path: str) -> dict[str, MetaTensor]:
        return Compose([LoadImaged(KEYS), EnsureChannelFirstd(KEYS)])(self.items[image_path])

    def check(self, patch: Mapping[str, Delivered]) -> str:
        """Compare one patch with the crop of its volume and give the volume's path."""
        path = patch["image"].path
        require(path in self.items, f"a patch names {path!r}, which is none of the volumes")
        require(patch["label"].path == self.items[path]["label"], f"{path}: label patch from {patch['label'].path}")
        volume = self.load(path)
        start = _start_from_affine(patch["image"].affine, volume["image"].affine.numpy())
        window = tuple(slice(first, first + self.patch_size) for first in start)
        for key in KEYS:
            where = f"{path}, {key} patch at {start}"
            delivered, expected = patch[key], volume[key].as_tensor()[(slice(None), *window)]
            require(delivered.data.dtype == expected.dtype, f"{where}: {delivered.data.dtype}, not {expected.dtype}")
            require(
                delivered.data.shape == expected.shape, f"{where}: {tuple(delivered.data.shape)} for a {expected.shape}"
            )
            require(torch.equal(delivered.data, expected), f"{where}: voxels differ from the volume's")
            affine = volume[key].affine.numpy().copy()
            affine[:3, 3] += affine[:3, :3] @ np.array(start)
            require(np.allclose(delivered.affine, affine), f"{where}: affine {delivered.affine}, not {affine}")
            recorded = delivered.recorded_start
            require(recorded is None or recorded == start, f"{where}: recorded location says {recorded}")
        self._check_label(volume["label"].as_tensor()[0], start, path)
        return path

    def _check_label(self, label: torch.Tensor, start: tuple[int, ...], path: str) -> None:
        """The center has a class that was asked for; one at the border may have been moved inside."""
        center = tuple(first + self.patch_size // 2 for first in start)
        last = tuple(size - self.patch_size for size in label.shape)
        at_border = any(first in (0, end) for first, end in zip(start, last, strict=True))
        class_ = int(label[center])
        require(at_border or class_ in CLASS_PROBABILITIES, f"{path}: center of the patch at {start} is class {class_}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _from_metatensor(patch: MetaTensor) -> Delivered:
    location = patch.meta.get("patch_location")
    start = None if location is None else tuple(int(first) for first in np.asarray(location).reshape(-1, 2)[:, 0])
    return Delivered(patch.as_tensor(), patch.affine.numpy(), str(patch.meta["filename_or_obj"]), start)


def _start_from_affine(patch_affine: np.ndarray, volume_affine: np.ndarray) -> tuple[int, ...]:
    start = np.linalg.solve(volume_affine, patch_affine[:, 3])[:3]
    require(bool(np.allclose(start, start.round(), atol=1e-3)), f"the affine puts a patch between voxels, at {start}")
    return tuple(int(value) for value in start.round())
