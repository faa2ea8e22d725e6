# SPDX-License-Identifier: Apache-2.0
"""How evenly a random queue draws its items: ours, torchvtk's, and what theory says."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import trange

from monai_patchqueue import RandomQueueDataset
from monai_patchqueue.queue.laps import Laps

Counts = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Draws:
    """What is drawn: ``steps`` batches of ``batch_size``, of ``items`` items by a queue of ``queue_length``."""

    items: int = 320
    steps: int = 10_000
    batch_size: int = 8
    queue_length: int = 64
    num_workers: int = 2
    seed: int = 0


def write_items(folder: Path, items: int) -> None:
    """Write small items in the files that both queues read."""
    for number in range(items):
        torch.save({"image": torch.full((1, 8, 8, 8), float(number)), "name": number}, folder / f"{number:04}.pt")


def count_ours(folder: Path, draws: Draws) -> Counts:
    """Draws of each item by ``RandomQueueDataset``, which time has no part in."""
    queue = RandomQueueDataset(
        folder,
        num_workers=draws.num_workers,
        batch_size=draws.batch_size,
        queue_length=draws.queue_length,
        epoch_length=draws.steps,
        seed=draws.seed,
    )
    counts = np.zeros(draws.items, np.int64)
    with queue:
        batches = iter(queue)
        for _ in trange(draws.steps, desc="ours", leave=False):
            np.add.at(counts, next(batches)["name"].numpy(), 1)
    return counts


def count_torchvtk(folder: Path, draws: Draws, pause: float) -> Counts:
    """The same by torchvtk's ``TorchQueueDataset``, by a consumer that takes ``pause`` seconds a step."""
    from torchvtk.datasets import TorchQueueDataset

    torch.manual_seed(draws.seed)
    queue = TorchQueueDataset(
        folder,
        mode="onsample",
        num_workers=draws.num_workers,
        q_maxlen=draws.queue_length,
        wait_fill=draws.queue_length,  # True is an int there, and waits for one item
        bs=draws.batch_size,
        log_sampling=True,
    )
    try:
        batches = iter(queue)
        for _ in trange(draws.steps, desc="torchvtk", leave=False):
            next(batches)
            time.sleep(pause)
        return np.array([queue.sample_dict[number] for number in range(draws.items)])
    finally:
        for worker in queue.workers:
            worker.terminate()
        queue.manager.shutdown()


def variation(counts: Counts) -> float:
    """Coefficient of variation: standard deviation / mean."""
    return float(counts.std() / counts.mean())


def predicted(draws: Draws) -> float:
    """The coefficient of variation that theory predicts, for the orders that the seed gives.

    An item is in the queue for ``queue_length`` batches each time it comes, and each of them draws it with
    p = batch_size / queue_length, whatever the others did. So in T batches it is drawn T p times on average, with
    variance T p (1 - p). That T differs between items, as the run begins and ends in the middle of some items' stays
    and of a pass through the data, adds to that.
    """
    p = draws.batch_size / draws.queue_length
    times = np.zeros(draws.items)
    laps = Laps(draws.seed, [1] * draws.items, apart=draws.queue_length)
    for entry in range(draws.steps + draws.queue_length - 1):
        first, stop = max(entry - draws.queue_length + 1, 0), min(entry + 1, draws.steps)
        times[laps.ticket(entry).volume] += stop - first
    mean = draws.steps * draws.batch_size / draws.items
    return float(np.sqrt(np.mean(times * p * (1 - p) + (times * p - mean) ** 2)) / mean)


def plot(counts: dict[str, Counts], draws: Draws, file: Path) -> None:
    """A bar for the draws of each item, and beside it how many items have how many."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.4 * len(counts)), layout="tight")
    rows = figure.subplots(len(counts), 2, squeeze=False, sharey="row", width_ratios=(4, 1))
    mean = draws.steps * draws.batch_size / draws.items
    highest = 1.05 * max(int(of_queue.max()) for of_queue in counts.values())
    bins = np.arange(0, highest + 10, max(round(mean / 25), 1))
    for (title, of_queue), (bars, histogram) in zip(counts.items(), rows, strict=True):
        bars.stairs(of_queue, fill=True, color="#4878a8")
        bars.axhline(mean, color="black", linewidth=0.8)
        bars.set(xlim=(0, draws.items), ylim=(0, highest), ylabel="draws")
        bars.set_title(f"{title}: coefficient of variation {100 * variation(of_queue):.1f} %", loc="left", fontsize=10)
        histogram.stairs(*np.histogram(of_queue, bins), orientation="horizontal", fill=True, color="#4878a8")
        histogram.axhline(mean, color="black", linewidth=0.8)
    rows[-1][0].set_xlabel("item")
    rows[-1][1].set_xlabel("items")
    figure.savefig(file, dpi=110)
