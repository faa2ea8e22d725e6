# SPDX-License-Identifier: Apache-2.0
"""Contestants: MONAI's datasets and loaders."""

from __future__ import annotations

from typing import Any

from .pipelines import CLASS_INDICES, cached, dataset, monai_crop, stock_loading
from .registry import Batches, contestant
from .setup import NUM_CLASSES, Setup
from .stores import persistent


@contestant("monai", "MONAI Dataset + DataLoader")
def monai_dataloader(setup: Setup) -> Batches:
    from monai.data import DataLoader

    return DataLoader(dataset(setup, [*stock_loading(), monai_crop(setup)]), **_options(setup))


@contestant("monai-thread", "MONAI Dataset + ThreadDataLoader")
def monai_thread(setup: Setup) -> Batches:
    from monai.data import ThreadDataLoader

    return ThreadDataLoader(dataset(setup, [*stock_loading(), monai_crop(setup)]), **_options(setup))


@contestant("monai-cache", "MONAI CacheDataset (all in RAM) + DataLoader")
def monai_cache(setup: Setup) -> Batches:
    from monai.data import DataLoader

    return DataLoader(cached(setup, [*stock_loading(), monai_crop(setup)]), **_options(setup))


@contestant("monai-cache-index", "MONAI CacheDataset with class indices (all in RAM) + DataLoader")
def monai_cache_index(setup: Setup) -> Batches:
    from monai.data import DataLoader

    return DataLoader(_indexed(setup), **_options(setup))


@contestant("monai-cache-thread", "MONAI CacheDataset with class indices (all in RAM) + ThreadDataLoader")
def monai_cache_thread(setup: Setup) -> Batches:
    from monai.data import ThreadDataLoader

    return ThreadDataLoader(_indexed(setup), **_options(setup))


def _persistent(setup: Setup) -> Any:
    return persistent(setup, [*stock_loading(), monai_crop(setup)])


@contestant("monai-persistent", "MONAI PersistentDataset + DataLoader", prepare=_persistent)
def monai_persistent(setup: Setup) -> Batches:
    from monai.data import DataLoader

    return DataLoader(_persistent(setup), **_options(setup))


def _indexed(setup: Setup) -> Any:
    """Class indices are made once, with the cached volumes."""
    from monai.transforms import ClassesToIndicesd

    indices = ClassesToIndicesd("label", num_classes=NUM_CLASSES)
    return cached(setup, [*stock_loading(), indices, monai_crop(setup, CLASS_INDICES)])


def _options(setup: Setup) -> dict[str, Any]:
    """One volume a batch, the fewest patches there can be; workers that live on, as ours do."""
    workers = setup.num_workers
    return {"batch_size": 1, "shuffle": True, "num_workers": workers, "persistent_workers": workers > 0}
