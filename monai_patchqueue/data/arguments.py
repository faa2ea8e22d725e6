# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments that the queue's public faces have in common."""

from __future__ import annotations

import multiprocessing
import sys
from dataclasses import MISSING, fields
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from monai.data import SmartCacheDataset
from monai.data.utils import worker_init_fn as monai_worker_init_fn
from torch.utils.data import IterableDataset

from ..queue.memory import parse_budget
from .options import QueueOptions

__all__ = ["check_dataset", "check_unused", "patch_batch_size", "positive", "resolve", "start_context"]


def check_dataset(dataset: Any) -> None:
    """Refuse what the queue cannot take volumes from."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            f"{type(dataset).__name__} is not map-style: the queue decides which volume is prepared next, and needs "
            "dataset[index] and len(dataset)."
        )
    if isinstance(dataset, SmartCacheDataset):
        raise TypeError(
            "SmartCacheDataset replaces its items between epochs, while the queue prepares the next epoch's "
            "volumes during "
            "this one. Use CacheDataset, PersistentDataset or Dataset: the queue keeps loading out of the way."
        )
    if len(dataset) == 0:
        raise ValueError("the dataset is empty: there is nothing to train on.")


def check_unused(*, prefetch_factor: int | None, batch_sampler: object, pin_memory_device: str, in_order: bool) -> None:
    """Refuse arguments of torch's ``DataLoader`` that mean nothing here."""
    if prefetch_factor is not None:
        raise ValueError(
            "prefetch_factor means nothing here: queue_length decides how far workers run ahead. Leave it out."
        )
    if batch_sampler is not None:
        raise ValueError(
            "batch_sampler is not supported: batches are drawn from the queue. Pass a sampler for the order of volumes."
        )
    if pin_memory_device and torch.device(pin_memory_device).type != "cuda":
        raise ValueError(
            f"pin_memory_device={pin_memory_device!r}: memory is pinned for CUDA devices. Leave it out, and pin_memory "
            "too where there is none."
        )
    if not in_order:
        raise ValueError("in_order=False is not supported: the order of batches is part of what the queue guarantees.")


def patch_batch_size(batch_size: int, batch_unit: str | None, counts: np.ndarray[Any, np.dtype[np.int64]]) -> int:
    """Patches in a batch.

    Raises:
        ValueError: a ``batch_unit`` that is not known, or ``"volume"`` where volumes give different numbers of patches.
    """
    positive("batch_size", batch_size)
    if batch_unit not in (None, "patch", "volume"):
        raise ValueError(f"batch_unit={batch_unit!r}: expected 'patch' or 'volume'.")
    if batch_unit != "volume":
        return batch_size
    if counts.min() != counts.max():
        raise ValueError(
            f"batch_unit='volume' needs the same number of patches from each volume; they give {counts.min()} to "
            f"{counts.max()}. Use batch_unit='patch'."
        )
    return batch_size * int(counts[0])


def start_context(method: str | BaseContext | None) -> BaseContext:
    """The multiprocessing context for ``method``; fork on Linux where none is named, spawn elsewhere.

    Raises:
        ValueError: a method that this system does not have.
    """
    if isinstance(method, BaseContext):
        return method
    name = method or ("fork" if sys.platform == "linux" else "spawn")
    if name not in multiprocessing.get_all_start_methods():
        raise ValueError(
            f"multiprocessing_context={name!r}: expected one of {multiprocessing.get_all_start_methods()} on this "
            "system."
        )
    context = multiprocessing.get_context(name)
    if name == "forkserver":
        # Its server, once started, hands torch and MONAI to each worker, which would import them for seconds otherwise.
        context.set_forkserver_preload(["monai_patchqueue"])
    return context


def resolve(*, multiprocessing_context: str | BaseContext | None, **arguments: Any) -> QueueOptions:
    """Check a queue's arguments against each other.

    Raises:
        TypeError, ValueError: with the argument's name, what was found and what is expected.
    """
    defaults = {field.name: field.default for field in fields(QueueOptions) if field.default is not MISSING}
    arguments = {**defaults, **arguments}
    for name in ("queue_length", "warmup"):
        if arguments[name] is not None:
            positive(name, arguments[name])
    positive("repeats", arguments["repeats"])
    positive("num_workers", arguments["num_workers"], least=0)
    if arguments["seed"] is not None:
        positive("seed", arguments["seed"], least=0)
    for name in ("volume_timeout", "timeout"):
        if arguments[name] is not None and not arguments[name] >= 0:
            raise ValueError(f"{name}={arguments[name]!r}: expected seconds, 0 or more.")
    if arguments["queue_length"] is not None and arguments["ram_budget"] is not None:
        raise ValueError("queue_length and ram_budget exclude each other: each decides how long the queue is.")
    if arguments["ram_budget"] is not None:
        parse_budget(arguments["ram_budget"])
    for name in ("patch_transform", "item_transform", "batch_transform", "collate_fn", "worker_init_fn"):
        if arguments[name] is not None and not callable(arguments[name]):
            raise TypeError(f"{name} is a {type(arguments[name]).__name__}; expected something callable.")
    _check_workers(arguments)
    if arguments["worker_init_fn"] is monai_worker_init_fn:
        arguments["worker_init_fn"] = None  # it seeds random transforms per worker; here they are, per volume
    device = arguments.pop("device")
    if arguments["pin_memory"] and not torch.cuda.is_available():
        arguments["pin_memory"] = False  # as torch's DataLoader does
    return QueueOptions(
        **{
            **arguments,
            "timeout": arguments["timeout"] or None,
            "device": None if device is None else torch.device(device),
            "context": start_context(multiprocessing_context),
        }
    )


def _check_workers(arguments: dict[str, Any]) -> None:
    if arguments["on_error"] not in ("raise", "replace"):
        raise ValueError(f"on_error={arguments['on_error']!r}: expected 'raise' or 'replace'.")
    if arguments["worker_type"] not in ("process", "thread"):
        raise ValueError(f"worker_type={arguments['worker_type']!r}: expected 'process' or 'thread'.")
    executor = arguments["executor"]
    if executor is not None:
        if arguments["num_workers"]:
            raise ValueError(
                "executor and num_workers exclude each other: the executor decides how many volumes it prepares."
            )
        if not callable(getattr(executor, "submit", None)):
            raise TypeError(f"executor is a {type(executor).__name__}; expected a concurrent.futures.Executor.")
    if arguments["volume_timeout"] is not None and (executor is not None or not arguments["num_workers"]):
        raise ValueError(
            "volume_timeout needs workers of the queue's own (num_workers >= 1): nobody else can give a volume up."
        )


def positive(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number, or a smaller one than ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r}: expected a whole number.")
    if value < least:
        raise ValueError(f"{name}={value!r}: expected {least} or more.")
