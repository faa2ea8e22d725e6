# SPDX-License-Identifier: Apache-2.0
"""One rank of a distributed run, as torchrun starts it: ``python step_together.py FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from monai_patchqueue import PatchQueueLoader
from monai_patchqueue.queue.memory import ranks_on_this_host
from tests.pipelines import Patches, drawn, make_loader

COUNTS = [5, 1, 3, 7, 2, 4, 6]


def one_epoch(loader: PatchQueueLoader) -> list[dict[str, Any]]:
    """An epoch's batches; all ranks meet after each, which ends in an error where one has more of them."""
    batches = []
    for batch in loader:
        batches.append(batch)
        dist.all_reduce(torch.ones(1))
    return batches


def main(folder: Path) -> None:
    """Two epochs, whose draws are left in a file."""
    dist.init_process_group("gloo")
    dataset = Patches(COUNTS)
    with make_loader(dataset, 1, sampler=DistributedSampler(dataset), batch_size=3) as loader:
        epochs = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            epochs.append(drawn(one_epoch(loader)))
    report = {"epochs": epochs, "ranks_here": ranks_on_this_host(), "steps": len(loader)}
    (folder / f"rank_{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
