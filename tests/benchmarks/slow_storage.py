# SPDX-License-Identifier: Apache-2.0
"""Steps per second on storage that is slower than training, by a plain loader and by random queues."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from monai.data import DataLoader, Dataset
from tqdm import tqdm

from monai_patchqueue import RandomQueueDataset


@dataclass(frozen=True)
class Storage:
    """What is loaded, by whom, and how long that takes.

    Args:
        seconds: that loading a batch's worth of items takes all workers together.
        items: in the data set.
        batch_size: items in a batch.
        queue_length: items in a random queue.
        num_workers: of each contestant.
        step: seconds of training on a batch, as a share of ``seconds``.
    """

    seconds: float
    items: int = 2000
    batch_size: int = 8
    queue_length: int = 64
    num_workers: int = 4
    step: float = 0.01

    def dataset(self) -> Dataset:
        """Items that are loaded by waiting, without processor time, for a time of their own that is always the same."""
        return Dataset([{"number": number} for number in range(self.items)], self._load)

    def _load(self, record: dict[str, int]) -> dict[str, Any]:
        mean = self.seconds * self.num_workers / self.batch_size
        time.sleep(random.Random(record["number"]).uniform(0.5, 1.5) * mean)
        return {**record, "image": torch.zeros(1, 16, 16, 16)}


@dataclass(frozen=True)
class Result:
    """What a contestant did; ``age`` and ``reuse`` are those of :class:`QueueStats`."""

    name: str
    steps: int
    seconds: float
    first_batch: float
    distinct: int
    age: float = 0.0
    reuse: float = 1.0

    @property
    def rate(self) -> float:
        """Steps per second, once a contestant is under way."""
        return self.steps / self.seconds


@dataclass(frozen=True)
class Policy:
    """A random queue's mode, and its ``samples_per_insert``."""

    mode: str
    samples_per_insert: int | None

    @property
    def name(self) -> str:
        limit = self.samples_per_insert
        return f'`mode="{self.mode}"`' + (f", `samples_per_insert={limit}`" if limit else "")


def policies(batch_size: int) -> list[Policy]:
    """The default first."""
    leading = [Policy("onsample", times * batch_size) for times in (1, 2, 8)]
    return [*leading, Policy("always", None), Policy("always", 8 * batch_size)]


def train_plainly(storage: Storage, steps: int) -> Result:
    """A plain ``DataLoader``; timed from when each worker has delivered its first batch."""
    loader = DataLoader(storage.dataset(), storage.num_workers, batch_size=storage.batch_size, shuffle=True)
    return _train(loader, storage, steps, "`DataLoader`", skipped=storage.num_workers)


def train_from_queue(storage: Storage, policy: Policy, steps: int) -> Result:
    """A random queue; timed from its first batch, with a full queue."""
    queue = RandomQueueDataset(
        storage.dataset(),
        num_workers=storage.num_workers,
        mode=policy.mode,
        epoch_length=steps + 1,
        batch_size=storage.batch_size,
        queue_length=storage.queue_length,
        wait_fill_timeout=10 * storage.queue_length / storage.batch_size * storage.seconds,
        samples_per_insert=policy.samples_per_insert,
        seed=0,
    )
    with queue:
        result = _train(queue, storage, steps, policy.name, skipped=1)
        stats = queue.stats()
    return replace(result, age=stats.age, reuse=stats.reuse)


def _train(loader: Iterable[Any], storage: Storage, steps: int, name: str, skipped: int) -> Result:
    seen: set[int] = set()
    asked = began = time.perf_counter()
    first = 0.0
    batches = iter(loader)
    for step in tqdm(range(steps + skipped), desc=name, leave=False):
        seen.update(next(batches)["number"].tolist())
        if step == 0:
            first = time.perf_counter() - asked
        time.sleep(storage.step * storage.seconds)
        if step == skipped - 1:
            began = time.perf_counter()
            seen.clear()
    return Result(name, steps, time.perf_counter() - began, first, len(seen))


def table(results: Sequence[Result]) -> str:
    """One row per contestant; the first is the one that the others are multiples of."""
    rows = [
        ["", "steps/s", "× `DataLoader`", "distinct items", "draws per item", "mean age", "first batch s"],
        ["---"] * 7,
    ]
    for result in results:
        rows.append(
            [
                result.name,
                f"{result.rate:.3g}",
                f"{result.rate / results[0].rate:.1f}",
                f"{result.distinct} in {result.steps} steps",
                f"{result.reuse:.1f}",
                f"{result.age:.1f}",
                f"{result.first_batch:.1f}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
