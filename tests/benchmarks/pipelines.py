# SPDX-License-Identifier: Apache-2.0
"""What contestants have in common: loading, crops by label and datasets, the same on all sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .setup import CLASS_PROBABILITIES, NUM_CLASSES, Setup

KEYS = ["image", "label"]
CLASS_INDICES = "label_cls_indices"


def stock_loading() -> list[Any]:
    """MONAI's own, channel first."""
    from monai.transforms import EnsureChannelFirstd, LoadImaged

    return [LoadImaged(KEYS), EnsureChannelFirstd(KEYS)]


def our_loading(lazy_read: bool) -> list[Any]:
    from monai_patchqueue import LoadVolumed

    return [LoadVolumed(KEYS, ensure_channel_first=True, lazy_read=lazy_read)]


def our_crop(setup: Setup) -> Any:
    from monai_patchqueue import RandLabelPatchd

    return RandLabelPatchd(
        KEYS,
        label_key="label",
        spatial_size=setup.patch_size,
        num_samples=setup.samples_per_volume,
        label_probabilities=CLASS_PROBABILITIES,
    )


def monai_crop(setup: Setup, indices_key: str | None = None) -> Any:
    from monai.transforms import RandCropByLabelClassesd

    return RandCropByLabelClassesd(
        KEYS,
        label_key="label",
        spatial_size=[setup.patch_size] * 3,
        num_classes=NUM_CLASSES,
        num_samples=setup.samples_per_volume,
        ratios=[CLASS_PROBABILITIES.get(class_, 0.0) for class_ in range(NUM_CLASSES)],
        indices_key=indices_key,
    )


def dataset(setup: Setup, transforms: list[Any]) -> Any:
    from monai.data import Dataset
    from monai.transforms import Compose

    return Dataset(setup.items, Compose(transforms))


def cached(setup: Setup, transforms: list[Any]) -> Any:
    """Volumes in RAM, not copied at each access: the crops don't change them."""
    from monai.data import CacheDataset
    from monai.transforms import Compose

    threads = max(1, setup.num_workers)
    return CacheDataset(setup.items, Compose(transforms), num_workers=threads, progress=False, copy_cache=False)


@dataclass
class Epochs:
    """A generator function as something to iterate again and again."""

    epoch: Callable[[], Iterator[Mapping[str, Any]]]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return self.epoch()
