# SPDX-License-Identifier: Apache-2.0
"""A queue's arguments, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

__all__ = ["QueueOptions"]


@dataclass(frozen=True)
class QueueOptions:
    """The arguments of a queue, checked and resolved; ``batch_size`` counts patches."""

    dataset: Dataset[Any]
    sampler: Iterable[int]
    counts: np.ndarray[Any, np.dtype[np.int64]]
    batch_size: int
    drop_last: bool = False
    queue_length: int | None = None
    ram_budget: float | int | str | None = None
    shuffle_patches: bool = True
    warmup: int | None = None
    repeats: int = 1
    seed: int | None = None
    num_workers: int = 0
    worker_type: Literal["process", "thread"] = "process"
    executor: Executor | None = None
    context: BaseContext | None = None
    persistent_workers: bool = True
    on_error: Literal["raise", "replace"] = "raise"
    volume_timeout: float | None = None
    timeout: float | None = None
    worker_init_fn: Callable[[int], object] | None = None
    patch_transform: Callable[[Any], Any] | None = None
    item_transform: Callable[[Any], Any] | None = None
    batch_transform: Callable[[Any], Any] | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None
    pin_memory: bool = False
    device: torch.device | None = None
