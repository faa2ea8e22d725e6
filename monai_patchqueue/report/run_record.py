# SPDX-License-Identifier: Apache-2.0
"""All that a report tells of a run, gathered step by step in memory that does not grow with the run."""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ..queue.stats import QueueStats
from .effort import Effort
from .history import Histogram, History
from .patch_map import PatchMap
from .patch_tally import PatchTally, label_of

__all__ = ["RunRecord", "Stall"]

_STALLS = 12
# Of a label map, so many voxels along each axis are looked at to learn how frequent its classes are.
_LATTICE = 6
# Instances of objects are no classes.
_CLASSES = 4096
_COLUMNS = {
    "time": "last",
    "epoch": "last",
    "fill": "sum",
    "wait": "sum",
    "longest": "max",
    "patches": "sum",
    "foreground": "sum",
    "memory": "max",
    "gpu": "sum",
    "gpu_memory": "max",
}


class Stall(NamedTuple):
    """A batch that was long waited for."""

    seconds: float
    step: int
    epoch: int
    time: float
    fill: float


class RunRecord:
    """What happened in a run.

    Args:
        image_key: where batches have the image, for the map of patches.
        label_key: where they have the label map; ``None``: nothing is told of classes.
        effort: share of the time that looking at batches may take; where it would take more, some are passed over.
    """

    def __init__(self, image_key: str | None = None, label_key: str | None = None, effort: float = 0.005) -> None:
        self.image_key = image_key
        self.label_key = label_key
        self._effort = Effort(effort)
        self.history = History(_COLUMNS)
        self.waits = Histogram()
        self.stalls: list[Stall] = []
        self.tally = None if label_key is None else PatchTally(label_key)
        self.voxels: Counter[int] = Counter()
        self.map = None if image_key is None else PatchMap()
        self.steps = 0
        self._began: float | None = None
        self._earlier = 0.0  # seconds of runs before this one
        self._patches = 0

    def begin(self, stats: QueueStats) -> None:
        """The engine starts."""
        if self._began is None:
            self._began = time.perf_counter()
            self._patches = stats.patches

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, with those of the runs that it goes on from."""
        return self._earlier + (time.perf_counter() - self._began if self._began is not None else 0.0)

    def look_at(self, batch: Any) -> None:
        """Take note of a batch, before anybody changes it, if it is time for that."""
        self._effort.spend(self._look_at, batch)

    def _look_at(self, batch: Any) -> None:
        classes: Any = None
        if self.tally is not None and self.label_key is not None:
            self.tally.add(batch)
            classes = self.tally.last_centers
            self._count_voxels(label_of(batch, self.label_key))
        image = batch.get(self.image_key) if self.map is not None and isinstance(batch, Mapping) else None
        if self.map is not None and isinstance(image, torch.Tensor):
            self.map.add(image, classes or [None] * len(image))

    def _count_voxels(self, label: torch.Tensor) -> None:
        if label.device.type != "cpu":
            return
        steps = (slice(size % _LATTICE // 2, None, -(-size // _LATTICE)) for size in label.shape[2:])
        lattice: Any = (slice(None), slice(None), *steps)
        some = label[lattice]
        if some.shape[1] > 1:
            self.voxels.update({channel: int((some[:, channel] > 0).sum()) for channel in range(some.shape[1])})
        else:
            values = some.float().numpy().astype(np.int64).ravel()
            least = int(values.min())
            counts = np.bincount(values - least) if int(values.max()) - least < _CLASSES else np.zeros(0, np.int64)
            self.voxels.update({least + int(place): int(counts[place]) for place in np.flatnonzero(counts)})

    def step(self, stats: QueueStats, machine: Mapping[str, float]) -> None:
        """Take note of a step that is over."""
        self.steps += 1
        now, wait = self.elapsed, stats.last_wait_seconds
        self.history.add(
            time=now,
            epoch=stats.epoch,
            fill=stats.fill,
            wait=wait,
            longest=wait,
            patches=stats.patches - self._patches,
            foreground=self.tally.last_foreground_share if self.tally else math.nan,
            memory=machine.get("memory_bytes", math.nan),
            gpu=machine.get("gpu_utilization", math.nan),
            gpu_memory=machine.get("gpu_memory_bytes", math.nan),
        )
        self._patches = stats.patches
        self.waits.add(wait)
        stall = Stall(wait, self.steps, stats.epoch, now, stats.fill)
        if len(self.stalls) < _STALLS:
            heapq.heappush(self.stalls, stall)
        elif stall > self.stalls[0]:
            heapq.heapreplace(self.stalls, stall)

    def state_dict(self) -> dict[str, Any]:
        """The record, as plain values and tensors."""
        return {
            "steps": self.steps,
            "elapsed": self.elapsed,
            "patches": self._patches,
            "history": self.history.state_dict(),
            "waits": self.waits.counts.tolist(),
            "stalls": [list(stall) for stall in self.stalls],
            "voxels": dict(self.voxels),
            "tally": None if self.tally is None else self.tally.state_dict(),
            "map": None if self.map is None else self.map.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, before the engine starts or while it does."""
        if self._began is not None:
            self._began = time.perf_counter()
        self.steps, self._earlier, self._patches = state["steps"], state["elapsed"], state["patches"]
        self.history.load_state_dict(state["history"])
        self.waits.counts[:] = state["waits"]
        self.stalls = [Stall(*stall) for stall in state["stalls"]]
        self.voxels = Counter(state["voxels"])
        for part, kept in ((self.tally, state["tally"]), (self.map, state["map"])):
            if part is not None and kept is not None:
                part.load_state_dict(kept)
