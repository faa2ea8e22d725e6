# SPDX-License-Identifier: Apache-2.0
"""What the handlers and ``stats()`` cost a training step, with warm caches and with cold ones on busy processors."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset, MetaTensor
from monai.transforms import Compose

from monai_patchqueue import PatchQueueLoader, QueueReportHandler, QueueStatsHandler, RandLabelPatchd

from .measure import all_cpu_seconds, cpu_seconds
from .report import environment

HELP = "processor time that the handlers take of a training step, with warm and with cold caches"

# More than a processor's caches hold.
TOUCHED = 2**26


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--volumes", type=int, default=3000)
    add("--batch-size", type=int, default=8, help="in patches")
    add("--patch-size", type=int, default=96)
    add("--no-foreground", action="store_true", help="label maps of background, all of which has to be looked through")
    add("--step-ms", type=float, default=20.0, help="length of the step that shares are of")
    add("--steps", type=int, default=150, help="of each run")


def main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    step = arguments.step_ms / 1000
    others, began = all_cpu_seconds() - cpu_seconds(), time.perf_counter()
    costs: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for cold in (False, True):
            with _busy_processors(cold), _loader(arguments) as loader:
                for name, make in _handlers(loader, folder).items():
                    costs.setdefault(name, []).append(_cost(make(), loader, arguments.steps, step, cold))
    print(f"| {arguments.step_ms:g} ms steps | warm, median | warm, mean | cold, median | cold, mean |")
    print("|---|---|---|---|---|")
    for name, runs in costs.items():
        cells = []
        for run, empty in zip(runs, costs["no handler"], strict=True):
            for middle in (statistics.median, statistics.fmean):
                seconds = middle(run) - middle(empty)
                cells.append(f"{1e6 * seconds:.0f} µs ({seconds / step:.2%})")
        print(f"| {name} | {' | '.join(cells)} |")
    rate = (all_cpu_seconds() - cpu_seconds() - others) / (time.perf_counter() - began)
    print(f"\nOther programs kept {max(rate, 0.0):.1f} of {environment()['cpus']} cores busy meanwhile.")
    return 0


def _loader(arguments: argparse.Namespace) -> PatchQueueLoader:
    """All items are one volume in memory."""
    rng = np.random.default_rng(0)
    size = arguments.patch_size + 32
    label = np.zeros((1, size, size, size), np.uint8)
    label[(0, *[slice(size // 2 - 4, size // 2 + 4)] * 3)] = not arguments.no_foreground
    item = {
        "image": MetaTensor(torch.from_numpy(rng.normal(size=label.shape).astype(np.float32))),
        "label": MetaTensor(torch.from_numpy(label)),
    }
    crop = RandLabelPatchd(
        ["image", "label"], "label", arguments.patch_size, num_samples=4, label_probabilities={0: 1, 1: 1}
    )
    return PatchQueueLoader(
        Dataset([item] * arguments.volumes, Compose([crop])),
        1,
        batch_size=arguments.batch_size,
        batch_unit="patch",
        seed=0,
        queue_length=32,
    )


def _handlers(loader: PatchQueueLoader, folder: str) -> dict[str, Callable[[], Any]]:
    def resumed() -> QueueStatsHandler:
        handler = QueueStatsHandler(loader, epoch_log=False)
        handler.load_state_dict(handler.state_dict())
        return handler

    return {
        "no handler": lambda: None,
        "loader.stats()": lambda: _OnlyStats(loader),
        "QueueStatsHandler": lambda: QueueStatsHandler(loader, epoch_log=False),
        "QueueStatsHandler, of a resumed run": resumed,
        "QueueStatsHandler, label_key": lambda: QueueStatsHandler(loader, epoch_log=False, label_key="label"),
        "QueueReportHandler": lambda: QueueReportHandler(loader, folder),
        "QueueReportHandler, label_key": lambda: QueueReportHandler(loader, folder, label_key="label"),
    }


class _OnlyStats:
    """Calls ``stats()`` after each step."""

    def __init__(self, loader: PatchQueueLoader) -> None:
        self.loader = loader

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.loader.stats)


def _cost(handler: Any, loader: PatchQueueLoader, steps: int, step: float, cold: bool) -> list[float]:
    """Seconds of processor time of the training thread between the first and the last handler of each step."""
    touched = np.zeros(TOUCHED // 8)

    def train(engine: Engine, batch: Any) -> None:
        until = time.perf_counter() + step
        if cold:
            np.add(touched, 1, out=touched)
        time.sleep(max(until - time.perf_counter(), 0.0))

    engine = Engine(train)
    began = spent = 0.0
    taken: list[float] = []

    def start() -> None:
        nonlocal began
        began = time.thread_time()

    def stop() -> None:
        nonlocal spent
        spent += time.thread_time() - began

    def note() -> None:
        nonlocal spent
        taken.append(spent)
        spent = 0.0

    events = Events.ITERATION_STARTED, Events.ITERATION_COMPLETED
    for event in events:
        engine.add_event_handler(event, start)
    if handler is not None:
        handler.attach(engine)
    for event in events:
        engine.add_event_handler(event, stop)
    engine.add_event_handler(Events.ITERATION_COMPLETED, note)
    engine.run(loader, max_epochs=1, epoch_length=steps)
    return taken[steps // 5 :]


@contextmanager
def _busy_processors(busy: bool) -> Iterator[None]:
    """A process on each processor that passes over memory all the time, as workers do that are never fast enough."""
    processes = [
        multiprocessing.get_context("fork").Process(target=_pass_over_memory, args=(os.getpid(),), daemon=True)
        for _ in range(environment()["cpus"] if busy else 0)
    ]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def _pass_over_memory(parent: int) -> None:
    block = np.zeros(TOUCHED // 8)
    while os.getppid() == parent:
        np.add(block, 1, out=block)
