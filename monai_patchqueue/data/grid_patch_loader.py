# SPDX-License-Identifier: Apache-2.0
"""``GridPatchLoader``: every patch of every volume, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from multiprocessing.context import BaseContext
from typing import Any, Literal

import torch
from monai.transforms import Compose
from monai.transforms.traits import RandomizableTrait
from torch.utils.data import Dataset, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from ..queue.seeding import reachable
from ..transforms import GridPatchSamplesd
from .arguments import check_dataset, positive
from .grid_counts import cut_into_pieces, grid_counts
from .grid_pieces import GridPieces
from .patch_queue_loader import PatchQueueLoader
from .volumes import SamplesPerVolume

__all__ = ["GridPatchLoader"]


class GridPatchLoader(PatchQueueLoader):
    """Batches of the patches of whole volumes, in order, while workers prepare the next volumes.

    For dense inference and for validation. Each volume's grid is gone through once in an epoch, patch by patch and
    volume by volume, without shuffling; a batch may hold the last patches of one volume and the first of the next.
    Volumes may differ in shape. :class:`PatchAggregator` puts the network's outputs together again: what it needs is in
    each batch, under ``"grid_patch"``.

    How many patches a volume has must be known before an epoch. It is told by the headers of files (or by the shapes of
    arrays) where the dataset's transforms keep shapes or can be applied lazily, as ``Spacingd`` and ``Orientationd``
    can. Other volumes (``CropForegroundd``) are loaded once more when the loader is made; a warning says so.

    Args:
        dataset: map-style dataset of whole volumes, as dictionaries.
        grid: the grid of each volume.
        num_workers: volumes prepared at the same time; 0: in the calling thread, when they are needed.
        batch_size: patches in a batch.
        shuffle: ``True`` is refused; the argument is there as in other loaders.
        sampler: which volumes, in which order. For several ranks, MONAI's
            ``DistributedSampler(dataset, even_divisible=False, shuffle=False)``: each volume belongs to one of them.
        samples_per_volume: patches that a volume has, where it is known better: a number, the name of a key of its
            record, or a callable from its record.
        patches_at_once: cut a volume in pieces of that many patches. A volume's patches need not fit into memory
            then; nor need the volume, where it is read lazily (``LoadVolumed(lazy_read=True)``). Otherwise each worker
            loads it, once: choose ``num_workers`` of 0 or 1. ``None``: all patches at once.
        queue_length: patches that are kept ready beside those of the volumes in preparation. Default: one batch.
        worker_type: ``"process"`` or ``"thread"``.
        executor: prepares volumes instead of workers of our own; excludes ``num_workers``.
        multiprocessing_context: ``"fork"``, ``"forkserver"``, ``"spawn"``. Default: fork on Linux, else spawn.
        persistent_workers: keep workers between epochs, and prepare the next epoch while one ends.
        patch_transform: applied in the worker, to each patch.
        batch_transform: applied to the collated batch.
        collate_fn: makes a batch from a list of patches; MONAI's ``list_data_collate`` otherwise.
        pin_memory: hand out batches in page-locked memory, where CUDA is there.
        device: move batches there.
        volume_timeout: seconds that preparing a volume (or a piece of it) may take.
        start_background: start the workers at once instead of at the first epoch.
        progress: show a progress bar over each epoch's batches.
        timeout: seconds to wait for a batch; 0: for as long as it takes.
        worker_init_fn: called with the worker's number when it starts.

    Raises:
        TypeError: a dataset or an argument of the wrong kind.
        ValueError: arguments that contradict each other, or a sampler that gives a volume twice.

    Example:
        >>> import numpy as np
        >>> from monai.data import Dataset
        >>> from monai_patchqueue import GridPatchLoader, GridPatchSamplesd, PatchAggregator
        >>> volumes = [{"image": np.random.rand(1, n, 20, 18).astype(np.float32)} for n in (24, 30, 17)]
        >>> grid = GridPatchSamplesd("image", spatial_size=16, overlap=0.5)
        >>> loader, aggregator = GridPatchLoader(Dataset(volumes), grid, batch_size=4), PatchAggregator("gaussian")
        >>> for batch in loader:
        ...     for volume in aggregator.add(batch["image"] * 2, batch):
        ...         print(tuple(volume.shape))
        (1, 24, 20, 18)
        (1, 30, 20, 18)
        (1, 17, 20, 18)
        >>> aggregator.finish()
    """

    grid: GridPatchSamplesd
    volumes: tuple[int, ...]
    """Numbers of the volumes that this loader goes through, in order."""

    def __init__(
        self,
        dataset: Dataset[Any],
        grid: GridPatchSamplesd,
        num_workers: int = 0,
        *,
        batch_size: int = 1,
        shuffle: bool = False,
        sampler: Iterable[int] | None = None,
        samples_per_volume: SamplesPerVolume | None = None,
        patches_at_once: int | None = None,
        queue_length: int | None = None,
        worker_type: Literal["process", "thread"] = "process",
        executor: Executor | None = None,
        multiprocessing_context: str | BaseContext | None = None,
        persistent_workers: bool = True,
        patch_transform: Callable[[Any], Any] | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        device: str | torch.device | None = None,
        volume_timeout: float | None = None,
        start_background: bool = False,
        progress: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], object] | None = None,
    ) -> None:
        check_dataset(dataset)
        if not isinstance(grid, GridPatchSamplesd):
            raise TypeError(f"grid is a {type(grid).__name__}; expected GridPatchSamplesd(keys, spatial_size, ...).")
        if shuffle:
            raise ValueError("shuffle=True: a grid's patches come in order. Use PatchQueueLoader to train on patches.")
        positive("batch_size", batch_size)
        positive("num_workers", num_workers, least=0)
        if patches_at_once is not None:
            positive("patches_at_once", patches_at_once)
            _check_deterministic(dataset)
        volumes = _volumes(dataset, sampler)
        processes = num_workers if worker_type == "process" and executor is None else 0
        counts = grid_counts(dataset, volumes, grid, samples_per_volume, processes)
        super().__init__(
            GridPieces(dataset, grid, cut_into_pieces(volumes, counts, patches_at_once)),
            num_workers,
            batch_size=batch_size,
            batch_unit="patch",
            queue_length=batch_size if queue_length is None else queue_length,
            worker_type=worker_type,
            executor=executor,
            multiprocessing_context=multiprocessing_context,
            persistent_workers=persistent_workers,
            patch_transform=patch_transform,
            batch_transform=batch_transform,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            device=device,
            volume_timeout=volume_timeout,
            start_background=start_background,
            progress=progress,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
        )
        own = {
            "dataset": dataset,
            "grid": grid,
            "sampler": SequentialSampler(dataset) if sampler is None else sampler,  # type: ignore[arg-type]
            "samples_per_volume": samples_per_volume,
            "patches_at_once": patches_at_once,
            "queue_length": queue_length,
            "volumes": tuple(volumes),
        }
        self.__dict__.update(own)


def _volumes(dataset: Any, sampler: Iterable[int] | None) -> list[int]:
    """The volumes to go through.

    Raises:
        ValueError: none, one that is not there, or one that comes twice, on this rank or on two.
    """
    if isinstance(sampler, DistributedSampler) and sampler.total_size != len(dataset):
        raise ValueError(
            f"{type(sampler).__name__} gives {sampler.total_size} volumes to {sampler.num_replicas} ranks, but there "
            f"are {len(dataset)}: some would be gone through twice or left out. Use "
            "monai.data.DistributedSampler(dataset, even_divisible=False, shuffle=False)."
        )
    volumes = list(range(len(dataset))) if sampler is None else [int(volume) for volume in sampler]
    if not volumes:
        raise ValueError(f"{type(sampler).__name__} gives no volume: there is nothing to go through.")
    seen: set[int] = set()
    for volume in volumes:
        if not 0 <= volume < len(dataset):
            raise ValueError(f"the sampler gives volume {volume}; expected 0 to {len(dataset) - 1}.")
        if volume in seen:
            raise ValueError(f"the sampler gives volume {volume} twice: each volume's grid is gone through once.")
        seen.add(volume)
    return volumes


def _check_deterministic(dataset: Any) -> None:
    for transform in reachable(dataset):
        if isinstance(transform, RandomizableTrait) and not isinstance(transform, Compose):
            raise ValueError(
                f"patches_at_once: a volume may be prepared several times, and {type(transform).__name__} would give "
                "another volume each time. Leave random transforms out, or give all patches at once."
            )
