# SPDX-License-Identifier: Apache-2.0
"""Random queues: how evenly items are drawn, ours beside torchvtk's, and how fast training is on slow storage."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .evenness import Counts, Draws, count_ours, count_torchvtk, plot, predicted, variation, write_items
from .report import environment
from .slow_storage import Storage, policies, table, train_from_queue, train_plainly

HELP = "how evenly a random queue draws, beside torchvtk's, and its steps per second on slow storage"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--steps", type=int, help="batches of 8 that are drawn of 320 items (default: 10000)")
    add("--pause", type=float, default=0.01, help="seconds a step that torchvtk is given the second time")
    add("--plot", type=Path, metavar="FILE", help="draw the draws of each item (needs matplotlib)")
    add("--storage", type=float, nargs="+", metavar="SECONDS", help="that a batch's items take to load (default: 0.5)")
    add("--budget", type=float, help="steps of a queue times seconds of storage (default: 500)")
    add("--only", choices=["evenness", "storage"], help="one of the two")
    add("--quick", action="store_true", help="few steps: a look, not a measurement")
    add("--json", type=Path, help="write all figures here")


def main(arguments: argparse.Namespace) -> int:
    figures: dict[str, Any] = {"environment": environment()}
    if arguments.only != "storage":
        draws = Draws(steps=arguments.steps or (500 if arguments.quick else 10_000))
        figures["draws"] = _evenness(draws, arguments.pause, arguments.plot)
    if arguments.only != "evenness":
        budget = arguments.budget or (10 if arguments.quick else 500)
        for seconds in arguments.storage or [0.1 if arguments.quick else 0.5]:
            figures[f"storage {seconds}"] = _storage(Storage(seconds), round(budget / seconds))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    return 0


def _evenness(draws: Draws, pause: float, file: Path | None) -> dict[str, list[int]]:
    counts: dict[str, Counts] = {}
    with tempfile.TemporaryDirectory(prefix="patchqueue-items-") as temporary:
        folder = Path(temporary)
        write_items(folder, draws.items)
        counts["RandomQueueDataset"] = count_ours(folder, draws)
        if find_spec("torchvtk") is None:
            print("torchvtk is left out, it is not installed: pip install --no-deps torchvtk==0.4.9", file=sys.stderr)
        else:
            counts["torchvtk"] = count_torchvtk(folder, draws, 0)
            counts[f"torchvtk, a step takes {1000 * pause:.0f} ms"] = count_torchvtk(folder, draws, pause)
    theory = 100 * predicted(draws)
    print(
        f"{draws.steps * draws.batch_size} draws of {draws.items} items by `onsample`, queue {draws.queue_length}, "
        f"batch {draws.batch_size}, {draws.num_workers} workers. Theory predicts a coefficient of variation of "
        f"{theory:.2f} %, with a standard error of {theory / math.sqrt(2 * draws.items):.2f} %.\n\n"
        "| | coefficient of variation | fewest draws | most |\n| --- | --- | --- | --- |"
    )
    for name, of_queue in counts.items():
        print(f"| {name} | {100 * variation(of_queue):.2f} % | {of_queue.min()} | {of_queue.max()} |")
    if file is not None:
        plot(counts, draws, file)
    return {name: of_queue.tolist() for name, of_queue in counts.items()}


def _storage(storage: Storage, steps: int) -> list[dict[str, Any]]:
    plain_steps = max(steps // 25, storage.num_workers)
    results = [train_plainly(storage, plain_steps)]
    results += [train_from_queue(storage, policy, steps) for policy in policies(storage.batch_size)]
    print(
        f"\n{storage.items} items, of which a batch's worth ({storage.batch_size}) takes {storage.num_workers} workers "
        f"{storage.seconds:g} s to load, by waiting; training takes {1000 * storage.step * storage.seconds:.0f} ms a "
        f"step; queue {storage.queue_length}.\n\n{table(results)}"
    )
    return [vars(result) for result in results]
