# SPDX-License-Identifier: Apache-2.0
"""``PatchQueueDataset``: the queue as an iterable dataset, for any DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from multiprocessing.context import BaseContext
from typing import Any, Literal

from monai.data import Dataset as MonaiDataset
from torch.utils.data import Dataset, IterableDataset, RandomSampler, SequentialSampler, get_worker_info

from .arguments import check_dataset, resolve
from .face import QueueFace
from .session import QueueSession
from .volumes import SamplesPerVolume, count_patches

__all__ = ["PatchQueueDataset"]


class PatchQueueDataset(QueueFace, IterableDataset[Any]):
    """Patches, one at a time, mixed from many volumes in a queue in memory, while workers prepare the next volumes.

    The same queue as :py:class:`~monai_patchqueue.PatchQueueLoader`, for a DataLoader of another kind. That one needs
    ``num_workers=0``: the workers are the queue's.

    Args:
        data: list of records, or a map-style dataset of volumes.
        transform: applied to each record, where ``data`` is a list; gives a dict or a list of dicts.
        num_workers: volumes prepared at the same time; 0: in the calling thread, when they are needed.
        shuffle_volumes: visit volumes in random order.
        volume_sampler: order of the volumes; excludes ``shuffle_volumes``, which is then ignored.
        shuffle_patches: draw patches at random from the queue. Default: if volumes are shuffled or sampled.

    The other arguments are those of :py:class:`~monai_patchqueue.PatchQueueLoader`.

    Raises:
        TypeError: data or an argument of the wrong kind.
        ValueError: arguments that contradict each other, or that cannot work.

    Example:
        >>> import numpy as np
        >>> from monai.data import DataLoader
        >>> from monai_patchqueue import PatchQueueDataset, RandUniformPatchd
        >>> volumes = [{"image": np.full((1, 32, 32, 32), i, np.float32)} for i in range(4)]
        >>> patches = PatchQueueDataset(volumes, RandUniformPatchd("image", spatial_size=16, num_samples=6), seed=0)
        >>> len(patches), [len(batch["image"]) for batch in DataLoader(patches, batch_size=10)]
        (24, [10, 10, 4])
    """

    _session: QueueSession

    def __init__(
        self,
        data: Sequence[Any] | Dataset[Any],
        transform: Callable[[Any], Any] | None = None,
        *,
        num_workers: int = 0,
        shuffle_volumes: bool = True,
        volume_sampler: Iterable[int] | None = None,
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
        repeats: int = 1,
        seed: int | None = None,
        on_error: Literal["raise", "replace"] = "raise",
        volume_timeout: float | None = None,
        start_background: bool = False,
        worker_init_fn: Callable[[int], object] | None = None,
    ) -> None:
        if isinstance(data, Dataset) and transform is not None:
            raise ValueError(
                "data is a dataset, with transforms of its own: pass transform only with a list of records."
            )
        dataset = data if isinstance(data, Dataset) else MonaiDataset(data, transform)
        check_dataset(dataset)
        sampler = volume_sampler
        if sampler is None:
            sampler = RandomSampler(dataset) if shuffle_volumes else SequentialSampler(dataset)  # type: ignore[arg-type]
        self.sampler = sampler
        at_random = shuffle_volumes or volume_sampler is not None
        self._begin(
            QueueSession(
                resolve(
                    dataset=dataset,
                    sampler=sampler,
                    counts=count_patches(dataset, samples_per_volume),
                    batch_size=1,
                    queue_length=queue_length,
                    ram_budget=ram_budget,
                    shuffle_patches=at_random if shuffle_patches is None else shuffle_patches,
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
                    worker_init_fn=worker_init_fn,
                    patch_transform=patch_transform,
                    item_transform=item_transform,
                    collate_fn=_only,
                )
            ),
            start_background,
        )

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        if info is not None:
            raise RuntimeError(
                f"PatchQueueDataset is used in a DataLoader with num_workers={info.num_workers}: each worker "
                "would run the "
                "whole queue again. The queue has workers of its own: pass num_workers to PatchQueueDataset, and "
                "num_workers=0 to the DataLoader."
            )
        return self._session.iterate()

    def __len__(self) -> int:
        return self._session.draws

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._session.describe()})"


def _only(patches: list[Any]) -> Any:
    return patches[0]
