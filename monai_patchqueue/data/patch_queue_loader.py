# SPDX-License-Identifier: Apache-2.0
"""``PatchQueueLoader``: the drop-in for MONAI's ``DataLoader``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from multiprocessing.context import BaseContext
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler
from tqdm import tqdm

from .arguments import check_dataset, check_unused, patch_batch_size, resolve
from .face import QueueFace
from .session import QueueSession
from .volumes import SamplesPerVolume, count_patches

__all__ = ["PatchQueueLoader"]


class PatchQueueLoader(QueueFace, DataLoader[Any]):
    """Batches of patches, mixed from many volumes in a queue in memory, while workers prepare the next volumes.

    A drop-in for :py:class:`monai.data.DataLoader`: any map-style dataset whose items are dicts (one patch) or lists of
    dicts (the patches of a volume, as MONAI's multi-sample crops give them). Batches have data, metadata and affines as
    MONAI's own collation gives them.

    Every volume gives exactly its number of patches in every epoch. With the same seed, batches are the same to the
    bit, whoever prepares the volumes and however many do.

    Args:
        dataset: map-style dataset of volumes.
        num_workers: volumes prepared at the same time; 0: in the calling thread, when they are needed.
        batch_size: patches in a batch (or volumes, with ``batch_unit="volume"``).
        shuffle: visit volumes in random order.
        sampler: order of the volumes, for instance a ``DistributedSampler``; excludes ``shuffle``.
        queue_length: patches that draws are made from. Default: min(patches per epoch, max(16 × samples per volume,
            8 × batch size)), at most a quarter of the memory.
        ram_budget: memory for these patches instead: a fraction (float up to 1) of what this process may use, bytes,
            or a text like ``"8GiB"``. Slots for volumes in preparation come on top; ``memory_bytes()`` counts them.
        samples_per_volume: patches that a volume gives: a number, the name of a key of its record, or a callable
            from its record. Default: as the dataset's transforms say.
        shuffle_patches: draw patches at random from the queue. Default: if ``shuffle`` or ``sampler`` is given.
        warmup: patches in the queue before the first batch of the first epoch. Default: one batch.
        worker_type: ``"process"`` or ``"thread"``.
        executor: prepares volumes instead of workers of our own; excludes ``num_workers``.
        multiprocessing_context: ``"fork"``, ``"forkserver"``, ``"spawn"``. Default: fork on Linux, else spawn.
        persistent_workers: keep workers between epochs, and prepare the next epoch while one drains.
        patch_transform: applied in the worker, to each patch once.
        item_transform: applied to a copy of a patch each time it is drawn.
        batch_transform: applied to the collated batch.
        collate_fn: makes a batch from a list of patches; MONAI's ``list_data_collate`` otherwise.
        drop_last: leave out an epoch's last batch if it is smaller.
        pin_memory: hand out batches in page-locked memory, where CUDA is there.
        device: move batches there.
        repeats: how often each patch is drawn before it leaves the queue (data echoing).
        seed: of all randomness. Default: torch's initial seed, which ``monai.utils.set_determinism`` sets.
        on_error: ``"raise"``: a volume that fails ends the epoch with its error; ``"replace"``: another volume of the
            epoch takes its place, and statistics and the log say so.
        volume_timeout: seconds that preparing a volume may take.
        batch_unit: ``"patch"`` or ``"volume"``: what ``batch_size`` counts.
        start_background: start the workers at once instead of at the first epoch.
        progress: show a progress bar over each epoch's batches.
        timeout: seconds to wait for a batch; 0: for as long as it takes.
        generator: for the order of volumes under ``shuffle``.
        worker_init_fn: called with the worker's number when it starts; MONAI's own has nothing to do here.
        prefetch_factor: refused: ``queue_length`` decides how far producers run ahead.
        batch_sampler: refused: batches are drawn from the queue.
        pin_memory_device: a CUDA device, whichever: what is pinned is pinned for all of them.
        in_order: ``False`` is refused: order is guaranteed.

    Raises:
        TypeError: a dataset or an argument of the wrong kind.
        ValueError: arguments that contradict each other, or that cannot work.

    Example:
        >>> import numpy as np
        >>> from monai.data import Dataset
        >>> from monai_patchqueue import PatchQueueLoader, RandUniformPatchd
        >>> volumes = [{"image": np.full((1, 32, 32, 32), i, np.float32)} for i in range(4)]
        >>> crop = RandUniformPatchd("image", spatial_size=16, num_samples=6)
        >>> loader = PatchQueueLoader(Dataset(volumes, crop), batch_size=8, shuffle=True, batch_unit="patch", seed=0)
        >>> len(loader), [tuple(batch["image"].shape) for batch in loader]
        (3, [(8, 1, 16, 16, 16), (8, 1, 16, 16, 16), (8, 1, 16, 16, 16)])
    """

    progress: bool
    _session: QueueSession

    def __init__(
        self,
        dataset: Dataset[Any],
        num_workers: int = 0,
        *,
        batch_size: int = 1,
        shuffle: bool = False,
        sampler: Iterable[int] | None = None,
        queue_length: int | None = None,
        ram_budget: float | int | str | None = None,
        samples_per_volume: SamplesPerVolume | None = None,
        shuffle_patches: bool | None = None,
        warmup: int | None = None,
        worker_type: Literal["process", "thread"] = "process",
        executor: Executor | None = None,
        multiprocessing_context: str | BaseContext | None = None,
        persistent_workers: bool = True,
        patch_transform: Callable[[Any], Any] | None = None,
        item_transform: Callable[[Any], Any] | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        pin_memory: bool = False,
        device: str | torch.device | None = None,
        repeats: int = 1,
        seed: int | None = None,
        on_error: Literal["raise", "replace"] = "raise",
        volume_timeout: float | None = None,
        batch_unit: Literal["patch", "volume"] | None = None,
        start_background: bool = False,
        progress: bool = False,
        timeout: float = 0,
        generator: torch.Generator | None = None,
        worker_init_fn: Callable[[int], object] | None = None,
        prefetch_factor: int | None = None,
        batch_sampler: None = None,
        pin_memory_device: str = "",
        in_order: bool = True,
    ) -> None:
        check_dataset(dataset)
        check_unused(
            prefetch_factor=prefetch_factor,
            batch_sampler=batch_sampler,
            pin_memory_device=pin_memory_device,
            in_order=in_order,
        )
        if shuffle and sampler is not None:
            raise ValueError("shuffle=True and a sampler exclude each other: the sampler decides the order.")
        counts = count_patches(dataset, samples_per_volume)
        patches_per_batch = patch_batch_size(batch_size, batch_unit, counts)
        # torch's own machinery gets neutral values: it is never to start workers of its own.
        super().__init__(
            dataset, batch_size=batch_size, shuffle=shuffle, sampler=sampler, drop_last=drop_last, generator=generator
        )
        order = sampler if sampler is not None else self.sampler
        drawn_at_random = shuffle or sampler is not None if shuffle_patches is None else shuffle_patches
        options = resolve(
            dataset=dataset,
            sampler=order,
            counts=counts,
            batch_size=patches_per_batch,
            drop_last=drop_last,
            queue_length=queue_length,
            ram_budget=ram_budget,
            shuffle_patches=drawn_at_random,
            warmup=warmup,
            repeats=repeats,
            seed=seed,
            num_workers=num_workers,
            worker_type=worker_type,
            executor=executor,
            multiprocessing_context=multiprocessing_context,
            persistent_workers=persistent_workers,
            on_error=on_error,
            volume_timeout=volume_timeout,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            patch_transform=patch_transform,
            item_transform=item_transform,
            batch_transform=batch_transform,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            device=device,
        )
        # Libraries make loaders anew from the signature and these attributes; torch guards some against assignment.
        given = {name: value for name, value in locals().items() if name in _ARGUMENTS}
        self.__dict__.update({**given, "sampler": order})
        self._begin(QueueSession(options), start_background)
        if batch_unit is None and counts.max() > 1:
            per_volume = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
            warnings.warn(
                f"batch_size={batch_size} counts patches here: {batch_size} in a batch. MONAI's DataLoader counts "
                "volumes: "
                f"{per_volume} × {batch_size} patches. Say batch_unit='patch' or batch_unit='volume' to choose.",
                stacklevel=2,
            )

    @property
    def multiprocessing_context(self) -> str | BaseContext | None:
        """How worker processes are started, as given."""
        context: str | BaseContext | None = self.__dict__.get("multiprocessing_context")
        return context

    @multiprocessing_context.setter
    def multiprocessing_context(self, context: str | BaseContext | None) -> None:
        self.__dict__["multiprocessing_context"] = context

    @property
    def _is_accelerate_prepared(self) -> bool:
        """What Accelerate asks before it makes a plain ``DataLoader`` of a loader's dataset; told so, it leaves us be.

        Raises:
            RuntimeError: Accelerate would have divided the volumes between processes, and nobody else does.
        """
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if ranks > 1 and isinstance(self.sampler, (RandomSampler, SequentialSampler)):
            raise RuntimeError(
                f"each of the {ranks} processes would train on all volumes: Accelerate cannot divide those of a queue. "
                "Give PatchQueueLoader a DistributedSampler."
            )
        return True

    @_is_accelerate_prepared.setter
    def _is_accelerate_prepared(self, prepared: bool) -> None:
        """Accelerate marks what it returns."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = self._session.iterate()
        return _with_progress(batches, self) if self.progress else batches

    def __len__(self) -> int:
        return len(self._session)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._session.describe()}, batches={len(self)})"


_ARGUMENTS = frozenset(PatchQueueLoader.__init__.__annotations__) - {"return"}


def _with_progress(batches: Iterator[Any], loader: PatchQueueLoader) -> Iterator[Any]:
    with tqdm(total=len(loader), desc="patches", unit="batch") as bar:
        for batch in batches:
            bar.set_postfix_str(loader.stats().line(), refresh=False)
            bar.update()
            yield batch
