# SPDX-License-Identifier: Apache-2.0
"""``RandomQueueDataset``: items stay in memory, and batches are drawn from them at random."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from multiprocessing.context import BaseContext
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..queue.random_schedule import ReusePolicy
from .arguments import check_dataset, positive, resolve
from .collate import collate_patches
from .face import QueueFace
from .folder import as_dataset
from .random_session import RandomOptions, RandomSession
from .volumes import SamplesPerVolume, count_patches

__all__ = ["RandomQueueDataset"]


class RandomQueueDataset(QueueFace, IterableDataset[Any]):
    """A random queue in memory: whole volumes or patches stay, and are drawn many times before they leave.

    For storage that is slower than training: batches are drawn at random from what is in memory, without replacement in
    a batch, while workers load the next items, which take the place of the oldest. Iterating gives collated batches;
    ``epoch_length`` of them make an epoch, and the queue goes on from one epoch to the next.

    An item is what ``data`` and ``transform`` give: a dictionary (a volume, for instance) or each dictionary of a list
    (the patches of a volume). Items may differ in shape. Each pass through the data has an order of its own, in which
    nothing comes again before it has left the queue; each rank of a distributed run takes its share of it.

    After ``TorchQueueDataset`` of `torchvtk <https://github.com/torchvtk/torchvtk>`_; names of reuse policies are those
    of `Reverb <https://github.com/google-deepmind/reverb>`_ and of prioritized experience replay (Schaul et al. 2016).

    Args:
        data: list of records, map-style dataset, or a folder: of ``.pt`` files, each a dictionary saved by
            ``torch.save``, or of files and Zarr stores for which ``transform`` gets ``{"image": path}``.
        transform: applied to each record, in a worker.
        num_workers: items prepared at the same time; 0: in the calling thread, when they are needed.
        mode: ``"onsample"``: one item enters for each batch, so that the same seed gives the same batches.
            ``"always"``: items enter as fast as workers prepare them, and batches depend on time.
        epoch_length: batches in an epoch; ``len()`` gives it.
        batch_size: items in a batch.
        queue_length: items in the queue. Never more than the data gives.
        ram_budget: memory for them, where ``queue_length`` is not given: a fraction (float up to 1) of what this
            process may use, bytes, or a text like ``"8GiB"``. Slots for items in preparation come on top.
        item_nbytes: bytes of an item on average, or a tensor of an item's size. Default: those of the first item.
        wait_fill: wait for a full queue (``True``) or for so many items before the first batch. ``False``: for as many
            as a batch takes; with ``"onsample"``, the queue then grows by an item a batch.
        wait_fill_timeout: seconds to wait for it. Then a warning says how far it got and why, and draws begin with what
            is there; if that is less than a batch, there is an error.
        item_transform: applied to a copy of an item each time it is drawn.
        batch_transform: applied to the collated batch.
        collate_fn: makes a batch from a list of items.
        log_sampling: log how evenly items were drawn, at the end of each epoch. ``stats().volume_counts`` has the
            counts at any time.
        filter_fn: which records to take; for a folder, which ``pathlib.Path``.
        seed: of all randomness. Default: torch's initial seed, which ``monai.utils.set_determinism`` sets.
        samples_per_insert: draws for each item that enters; default: ``batch_size``, one item a batch. With
            ``"always"``, a limit on reuse: a batch waits for items when draws would exceed this number times the items
            that have entered. Default there: no limit.
        min_size_to_sample: items without which no batch is drawn; at least ``batch_size``.
        max_times_sampled: an item leaves after so many draws.
        priority_exponent: draw items with probabilities in proportion to priority ** priority_exponent (0: uniform).
            Items begin with the highest priority so far. A batch then has the keys ``"item_id"`` (int64) and
            ``"importance_weight"`` (float32, up to 1), and is drawn when it is asked for.
        importance_sampling_exponent: how far weights undo the priorities: (p_min / p) ** this.
        samples_per_volume: items that a record gives, as in :class:`PatchQueueLoader`. Default: as transforms say.
        worker_type: ``"process"`` or ``"thread"``.
        executor: prepares items instead of workers of our own; excludes ``num_workers``.
        multiprocessing_context: ``"fork"``, ``"forkserver"``, ``"spawn"``. Default: fork on Linux, else spawn.
        patch_transform: applied in the worker, to each item once.
        pin_memory: hand out batches in page-locked memory, where CUDA is there.
        device: move batches there.
        on_error: ``"raise"`` or ``"replace"``, as in :class:`PatchQueueLoader`.
        volume_timeout: seconds that preparing an item may take.
        worker_init_fn: called with the worker's number when it starts.
        start_background: start filling at once instead of at the first batch.

    Raises:
        TypeError: data or an argument of the wrong kind.
        ValueError: arguments that contradict each other, or that cannot work.

    Example:
        >>> import torch
        >>> from monai_patchqueue import RandomQueueDataset
        >>> volumes = [{"image": torch.full((1, 16, 16, 16), float(i))} for i in range(20)]
        >>> queue = RandomQueueDataset(volumes, batch_size=4, queue_length=8, epoch_length=50, num_workers=0, seed=0)
        >>> sum(len(batch["image"]) for batch in queue)
        200
        >>> min(queue.stats().volume_counts.values()), max(queue.stats().volume_counts.values())
        (4, 15)
    """

    _session: RandomSession

    def __init__(
        self,
        data: Sequence[Any] | Dataset[Any] | str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        *,
        num_workers: int = 1,
        mode: Literal["onsample", "always"] = "onsample",
        epoch_length: int = 1000,
        batch_size: int = 1,
        queue_length: int | None = None,
        ram_budget: float | int | str | None = 0.5,
        item_nbytes: int | float | torch.Tensor | None = None,
        wait_fill: bool | int = True,
        wait_fill_timeout: float = 60,
        item_transform: Callable[[Any], Any] | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] = collate_patches,
        log_sampling: bool = False,
        filter_fn: Callable[[Any], bool] | None = None,
        seed: int | None = None,
        samples_per_insert: float | None = None,
        min_size_to_sample: int | None = None,
        max_times_sampled: int | None = None,
        priority_exponent: float | None = None,
        importance_sampling_exponent: float = 0.4,
        samples_per_volume: SamplesPerVolume | None = None,
        worker_type: Literal["process", "thread"] = "process",
        executor: Executor | None = None,
        multiprocessing_context: str | BaseContext | None = None,
        patch_transform: Callable[[Any], Any] | None = None,
        pin_memory: bool = False,
        device: str | torch.device | None = None,
        on_error: Literal["raise", "replace"] = "raise",
        volume_timeout: float | None = None,
        worker_init_fn: Callable[[int], object] | None = None,
        start_background: bool = False,
    ) -> None:
        dataset = as_dataset(data, transform, filter_fn)
        check_dataset(dataset)
        counts = count_patches(dataset, samples_per_volume)
        if queue_length is not None:
            ram_budget = None
        elif ram_budget is None:
            raise ValueError("pass queue_length or ram_budget: one of them has to say how long the queue is.")
        if executor is not None and num_workers == 1:
            num_workers = 0  # the default is not meant
        options = resolve(
            dataset=dataset,
            sampler=range(len(counts)),
            counts=counts,
            batch_size=batch_size,
            queue_length=queue_length,
            ram_budget=ram_budget,
            seed=seed,
            num_workers=num_workers,
            worker_type=worker_type,
            executor=executor,
            multiprocessing_context=multiprocessing_context,
            on_error=on_error,
            volume_timeout=volume_timeout,
            worker_init_fn=worker_init_fn,
            patch_transform=patch_transform,
            item_transform=item_transform,
            batch_transform=batch_transform,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            device=device,
        )
        policy = _policy(
            mode,
            batch_size,
            queue_length,
            samples_per_insert,
            min_size_to_sample,
            max_times_sampled,
            priority_exponent,
            importance_sampling_exponent,
        )
        if policy.always and not num_workers and executor is None:
            raise ValueError("mode='always' needs num_workers >= 1: somebody has to load while batches are drawn.")
        positive("epoch_length", epoch_length)
        if not wait_fill_timeout >= 0:
            raise ValueError(f"wait_fill_timeout={wait_fill_timeout!r}: expected seconds, 0 or more.")
        self.epoch_length = epoch_length
        self._begin(
            RandomSession(
                options,
                RandomOptions(
                    policy,
                    epoch_length,
                    item_nbytes=_nbytes(item_nbytes),
                    wait_fill=_items_to_wait_for(wait_fill),
                    wait_fill_timeout=wait_fill_timeout,
                    log_sampling=log_sampling,
                ),
            ),
            start_background,
        )

    def __iter__(self) -> Iterator[Any]:
        self._refuse_workers()
        return self._session.iterate()

    def __len__(self) -> int:
        return self.epoch_length

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._session.describe()})"

    def batch_generator(self) -> Iterator[Any]:
        """Batches without end, epoch after epoch."""
        self._refuse_workers()
        return self._session.endless()

    def get_dataloader(self, **kwargs: Any) -> DataLoader[Any]:
        """A ``DataLoader`` that hands the queue's batches out as they are.

        Args:
            kwargs: arguments of ``torch.utils.data.DataLoader`` that are left to decide, such as ``pin_memory``.

        Raises:
            ValueError: ``num_workers``, ``batch_size`` and others that the queue has decided.
        """
        for name in ("num_workers", "batch_size", "shuffle", "sampler", "batch_sampler", "collate_fn", "drop_last"):
            if kwargs.get(name):
                raise ValueError(f"{name}={kwargs[name]!r} is the queue's to decide: pass it to RandomQueueDataset.")
            kwargs.pop(name, None)
        return DataLoader(self, batch_size=None, collate_fn=_as_it_is, **kwargs)

    @property
    def qsize(self) -> int:
        """Items that are in the queue."""
        return self._session.qsize

    def wait_fill_queue(self, fill_atleast: int | None = None, timeout: float = 60) -> int:
        """Start filling, and wait for so many items (``None``: for a full queue).

        Returns:
            The number of items in the queue. After ``timeout`` seconds, a warning says how far it got and why.

        Raises:
            RuntimeError: less than a batch within ``timeout`` seconds.
        """
        if fill_atleast is not None:
            positive("fill_atleast", fill_atleast)
        return self._session.wait_fill(fill_atleast, timeout)

    def update_priorities(
        self, ids: Iterable[int] | np.ndarray[Any, Any] | torch.Tensor, values: Iterable[float] | torch.Tensor
    ) -> None:
        """Set the priorities of items, from the next batch on.

        Args:
            ids: a batch's ``"item_id"``, [batch]; items that have left meanwhile are passed over.
            values: as many priorities, 0 or more.

        Raises:
            ValueError: negative or infinite priorities, NaN, or another number of them than of ids.
            RuntimeError: without ``priority_exponent``.
        """
        numbers = torch.as_tensor(ids).reshape(-1).tolist()
        priorities = torch.as_tensor(values, dtype=torch.float64).detach().reshape(-1).tolist()
        if len(numbers) != len(priorities):
            raise ValueError(f"{len(numbers)} ids and {len(priorities)} priorities: expected one for each.")
        bad = [value for value in priorities if not 0 <= value < float("inf")]
        if bad:
            raise ValueError(f"priorities: found {bad[0]}, expected finite numbers, 0 or more.")
        self._session.update_priorities(numbers, priorities)

    def _refuse_workers(self) -> None:
        info = get_worker_info()
        if info is not None:
            raise RuntimeError(
                f"RandomQueueDataset is used in a DataLoader with num_workers={info.num_workers}: each worker would "
                "run a queue of its own. Pass num_workers to RandomQueueDataset, and num_workers=0 to the DataLoader."
            )


def _policy(
    mode: str,
    batch_size: int,
    queue_length: int | None,
    samples_per_insert: float | None,
    min_size_to_sample: int | None,
    max_times_sampled: int | None,
    priority_exponent: float | None,
    importance_exponent: float,
) -> ReusePolicy:
    if mode not in ("onsample", "always"):
        raise ValueError(f"mode={mode!r}: expected 'onsample' or 'always'.")
    positive("batch_size", batch_size)
    if samples_per_insert is not None and not 0 < samples_per_insert < float("inf"):
        raise ValueError(f"samples_per_insert={samples_per_insert!r}: expected a number above 0.")
    least = batch_size
    if min_size_to_sample is not None:
        positive("min_size_to_sample", min_size_to_sample)
        least = max(least, min_size_to_sample)
    if queue_length is not None and queue_length < least:
        raise ValueError(
            f"queue_length={queue_length!r}: a batch needs {least} items (batch_size={batch_size}, "
            f"min_size_to_sample={min_size_to_sample}), as no item comes twice in it."
        )
    if max_times_sampled is not None:
        positive("max_times_sampled", max_times_sampled)
    for name, value in (
        ("priority_exponent", priority_exponent),
        ("importance_sampling_exponent", importance_exponent),
    ):
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value!r}: expected a number, 0 or more.")
    return ReusePolicy(
        batch_size=batch_size,
        always=mode == "always",
        samples_per_insert=samples_per_insert,
        min_size_to_sample=least,
        max_times_sampled=max_times_sampled,
        priority_exponent=priority_exponent,
        importance_exponent=importance_exponent,
    )


def _nbytes(item: int | float | torch.Tensor | None) -> int | None:
    if item is None:
        return None
    if isinstance(item, torch.Tensor):
        return max(item.numel() * item.element_size(), 1)
    if isinstance(item, bool) or not isinstance(item, (int, float)) or not 1 <= item < float("inf"):
        raise ValueError(f"item_nbytes={item!r}: expected bytes, 1 or more, or a tensor of an item's size.")
    return int(item)


def _items_to_wait_for(wait_fill: bool | int) -> int | None:
    if isinstance(wait_fill, bool):
        return None if wait_fill else 0
    positive("wait_fill", wait_fill, least=0)
    return int(wait_fill)


def _as_it_is(batch: Any) -> Any:
    return batch
