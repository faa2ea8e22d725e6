# SPDX-License-Identifier: Apache-2.0
"""What the handlers and ``stats()`` cost a training step: ``python -m tests.benchmarks.handlers``.

Batches of 8 patches of 96³ voxels (float32 image, uint8 label, with metadata) out of 3000 volumes. Times are processor
times of the calling thread, the median over steps; shares are of a step of 20 ms.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset, MetaTensor
from monai.transforms import Compose

from monai_patchqueue import PatchQueueLoader, QueueReportHandler, QueueStatsHandler, RandLabelPatchd

VOLUMES, BATCH, STEP = 3000, 8, 0.020


def make_loader() -> PatchQueueLoader:
    """All items are one volume in memory."""
    rng = np.random.default_rng(0)
    label = np.zeros((1, 128, 128, 128), np.uint8)
    label[0, 60:68, 60:68, 60:68] = 1
    item = {
        "image": MetaTensor(torch.from_numpy(rng.normal(size=label.shape).astype(np.float32))),
        "label": MetaTensor(torch.from_numpy(label)),
    }
    crop = RandLabelPatchd(["image", "label"], "label", 96, num_samples=4, label_probabilities={0: 1, 1: 1})
    return PatchQueueLoader(
        Dataset([item] * VOLUMES, Compose([crop])), 1, batch_size=BATCH, batch_unit="patch", seed=0, queue_length=32
    )


def cost(handler: Any, loader: PatchQueueLoader, steps: int = 100) -> float:
    """Seconds of processor time that a handler takes in a step."""
    engine = Engine(lambda engine, batch: time.sleep(STEP))
    began = [0.0]
    spent = [0.0]
    taken: list[float] = []

    def start() -> None:
        began[0] = time.thread_time()

    def stop() -> None:
        spent[0] += time.thread_time() - began[0]

    def note() -> None:
        taken.append(spent[0])
        spent[0] = 0.0

    events = Events.ITERATION_STARTED, Events.ITERATION_COMPLETED
    for event in events:
        engine.add_event_handler(event, start)
    if handler is not None:
        handler.attach(engine)
    for event in events:
        engine.add_event_handler(event, stop)
    engine.add_event_handler(Events.ITERATION_COMPLETED, note)
    engine.run(loader, max_epochs=1, epoch_length=steps)
    return statistics.median(taken[steps // 5 :])


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    with make_loader() as loader:
        next(iter(loader))
        repeats = 300
        start = time.thread_time()
        for _ in range(repeats):
            loader.stats()
        print(f"loader.stats(): {(time.thread_time() - start) / repeats * 1e6:.0f} µs, {VOLUMES} volumes")
        folder = tempfile.mkdtemp()
        handlers: dict[str, Callable[[], Any]] = {
            "nothing": lambda: None,
            "QueueStatsHandler": lambda: QueueStatsHandler(loader, epoch_log=False),
            "QueueStatsHandler, label_key": lambda: QueueStatsHandler(loader, epoch_log=False, label_key="label"),
            "QueueReportHandler": lambda: QueueReportHandler(loader, folder),
            "QueueReportHandler, label_key": lambda: QueueReportHandler(loader, folder, label_key="label"),
        }
        empty = 0.0
        for name, make in handlers.items():
            seconds = cost(make(), loader)
            empty = empty or seconds
            print(f"{name}: {1e6 * (seconds - empty):.0f} µs a step, {(seconds - empty) / STEP:.2%} of 20 ms")


if __name__ == "__main__":
    main()
