# SPDX-License-Identifier: Apache-2.0
"""Contestants: PatchQueueLoader, from files, from memory and from the store."""

from __future__ import annotations

from typing import Any, Literal

from .pipelines import cached, dataset, monai_crop, our_crop, our_loading, stock_loading
from .registry import Batches, contestant
from .setup import Setup
from .stores import chunked

STORE: dict[str, Any] = {
    "requires": "blosc2",
    "remedy": "'monai_patchqueue[store]'",
    "imports": ("monai_patchqueue",),
}


@contestant("patchqueue", "PatchQueueLoader, LoadImaged", requires="monai_patchqueue")
def patchqueue(setup: Setup) -> Batches:
    return _loader(setup, dataset(setup, [*stock_loading(), our_crop(setup)]))


@contestant("patchqueue-reader", "PatchQueueLoader, LoadVolumed(lazy_read=True)", requires="monai_patchqueue")
def patchqueue_reader(setup: Setup) -> Batches:
    """Our reader in place of LoadImaged: reads, or converts, the patches of a volume only."""
    return _loader(setup, dataset(setup, [*our_loading(lazy_read=True), our_crop(setup)]))


@contestant("patchqueue-whole", "PatchQueueLoader, LoadVolumed", requires="monai_patchqueue")
def patchqueue_whole(setup: Setup) -> Batches:
    """Our reader in place of LoadImaged, whole volumes."""
    return _loader(setup, dataset(setup, [*our_loading(lazy_read=False), our_crop(setup)]))


@contestant("patchqueue-thread", "PatchQueueLoader, LoadImaged, threads", requires="monai_patchqueue")
def patchqueue_thread(setup: Setup) -> Batches:
    return _loader(setup, dataset(setup, [*stock_loading(), our_crop(setup)]), "thread")


@contestant("patchqueue-monai-crop", "PatchQueueLoader, LoadImaged, MONAI's crop", requires="monai_patchqueue")
def patchqueue_monai_crop(setup: Setup) -> Batches:
    return _loader(setup, dataset(setup, [*stock_loading(), monai_crop(setup)]))


@contestant("patchqueue-cache", "PatchQueueLoader, CacheDataset (all in RAM)", requires="monai_patchqueue")
def patchqueue_cache(setup: Setup) -> Batches:
    return _loader(setup, cached(setup, [*stock_loading(), our_crop(setup)]))


@contestant(
    "patchqueue-cache-index",
    "PatchQueueLoader, CacheDataset with LabelIndexd (all in RAM)",
    requires="monai_patchqueue",
)
def patchqueue_cache_index(setup: Setup) -> Batches:
    from monai_patchqueue import LabelIndexd

    return _loader(setup, cached(setup, [*stock_loading(), LabelIndexd("label"), our_crop(setup)]))


def _stored(setup: Setup) -> Any:
    return chunked(setup, [*stock_loading(), our_crop(setup)])


@contestant("patchqueue-store", "PatchQueueLoader, ChunkedDataset", prepare=_stored, **STORE)
def patchqueue_store(setup: Setup) -> Batches:
    return _loader(setup, _stored(setup))


def _stored_normalized(setup: Setup) -> Any:
    """As nnU-Net stores images: no integers any more, which take fewer bytes."""
    from monai.transforms import NormalizeIntensityd

    return chunked(setup, [*stock_loading(), NormalizeIntensityd("image"), our_crop(setup)])


@contestant(
    "patchqueue-store-normalized",
    "PatchQueueLoader, ChunkedDataset, normalized images",
    layout=None,
    prepare=_stored_normalized,
    **STORE,
)
def patchqueue_store_normalized(setup: Setup) -> Batches:
    return _loader(setup, _stored_normalized(setup))


def _loader(setup: Setup, volumes: Any, worker_type: Literal["process", "thread"] = "process") -> Batches:
    from monai_patchqueue import PatchQueueLoader

    return PatchQueueLoader(
        volumes,
        num_workers=setup.num_workers,
        batch_size=setup.batch_size,
        shuffle=True,
        queue_length=setup.queue_length,
        seed=setup.seed,
        worker_type=worker_type,
        batch_unit="patch",
    )
