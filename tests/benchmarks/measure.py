# SPDX-License-Identifier: Apache-2.0
"""What runs in a contestant's process: ``python -m tests.benchmarks.measure RESULT``, with the request on stdin."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from .contestants import CONTESTANTS, Contestant
from .pipelines import KEYS
from .setup import Setup


def read_voxels(batch: Mapping[str, Any]) -> None:
    """Read each voxel once in this thread, as a copy to a device would."""
    for key in KEYS:
        batch[key].as_subclass(torch.Tensor).numpy().sum()


def volumes_of(batch: Mapping[str, Any]) -> list[str]:
    """The file of each patch in a batch; nothing where batches don't say."""
    if "meta" in batch:
        return list(batch["meta"]["image"]["path"])
    return list(getattr(batch["image"], "meta", {}).get("filename_or_obj", []))


def cpu_seconds() -> float:
    """Processor time of this process, its living descendants and those that have ended."""
    total = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def all_cpu_seconds() -> float:
    """Processor time of everything on this machine."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def consume(
    loader: Iterable[Mapping[str, Any]], setup: Setup, seconds: float, sleep: float = 0.0, read: bool = True
) -> dict[str, Any]:
    """Run one epoch that doesn't count, then `setup.epochs` that do, or as many as take so many `seconds`.

    A wait lasts from when the consumer is ready until it holds a batch; the end of an epoch and the start of the next
    are part of it. A batch of twice `batch_size` patches is two steps: one wait, a wait of nothing, two sleeps.
    """
    waits: list[float] = []
    mixed: list[int] = []
    patches, started, cpu_started, all_cpu_started = 0, 0.0, 0.0, 0.0
    first_wait = None
    ready = time.perf_counter()
    for epoch in count():
        if epoch == 1:
            waits, mixed, patches = [], [], 0
            cpu_started, all_cpu_started = cpu_seconds(), all_cpu_seconds()
            started = ready = time.perf_counter()
        elif epoch > setup.epochs and time.perf_counter() - started >= seconds:
            break
        for batch in loader:
            waits.append(time.perf_counter() - ready)
            first_wait = waits[0] if first_wait is None else first_wait
            if read:
                read_voxels(batch)
            patches += len(batch["image"])
            steps = -(-len(batch["image"]) // setup.batch_size)
            waits.extend([0.0] * (steps - 1))
            volumes = volumes_of(batch)
            mixed += [len({*volumes[i : i + setup.batch_size]}) for i in range(0, len(volumes), setup.batch_size)]
            del batch  # a training loop's batch is gone when it asks for the next
            if sleep:
                time.sleep(sleep * steps)
            ready = time.perf_counter()
    wall = time.perf_counter() - started
    epochs = epoch - 1
    cpu = cpu_seconds() - cpu_started
    others = max(0.0, all_cpu_seconds() - all_cpu_started - cpu) / wall
    expected = epochs * setup.patches_per_epoch
    if patches != expected:
        raise RuntimeError(f"{patches} patches in {epochs} epochs, {expected} expected")
    milliseconds = 1000 * np.array(waits)
    return {
        "first_wait_s": first_wait,
        "wall_s": wall,
        "epochs": epochs,
        "patches_per_s": patches / wall,
        "volumes_per_step": float(np.mean(mixed)) if mixed else None,
        "cpu_ms_per_patch": 1000 * cpu / patches,
        "others_cores": others,
        "stalled": float(np.sum(waits)) / wall,
        "wait_p50_ms": float(np.percentile(milliseconds, 50)),
        "wait_p99_ms": float(np.percentile(milliseconds, 99)),
        "wait_max_ms": float(milliseconds.max()),
    }


def time_contestant(contestant: Contestant, setup: Setup) -> dict[str, Any]:
    """Free-running epochs, then, where `setup` wants them, epochs with a consumer that sleeps."""
    for module in (contestant.requires, *contestant.imports):
        import_module(module)
    before = time.perf_counter()
    loader = contestant.build(setup)
    built = time.perf_counter() - before
    free = consume(loader, setup, setup.seconds, read=contestant.read)
    figures = {"first_batch_s": built + free["first_wait_s"], "free": free}
    if setup.paced:
        figures["paced"] = consume(loader, setup, setup.paced_seconds, setup.sleep, contestant.read)
    return figures


def check_contestant(contestant: Contestant, setup: Setup) -> dict[str, Any]:
    """Prepare what a contestant needs, and compare an epoch's patches with the stock pipeline's; a limit has none."""
    if contestant.prepare is not None:
        contestant.prepare(setup)
    if contestant.layout is None:
        return {}
    from . import check

    unpack = {"monai": check.unpack_monai, "torchio": check.unpack_torchio}[contestant.layout]
    try:
        checked = replace(setup, items=setup.items[: setup.checked_volumes])
        return check.check_delivery(contestant.build(checked), unpack, checked)
    except AssertionError as error:
        raise AssertionError(f"{contestant.title} doesn't deliver what the stock pipeline does: {error}") from error


MODES = {"time": time_contestant, "check": check_contestant}


def main() -> None:
    request = json.load(sys.stdin)
    function, setup = MODES[request["mode"]], Setup.from_json(request["setup"])
    results = {name: function(CONTESTANTS[name], setup) for name in request["contestants"]}
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
