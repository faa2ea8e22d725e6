# SPDX-License-Identifier: Apache-2.0
"""What one benchmark runs on: sizes, counts and files, the same for every contestant."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

NUM_CLASSES = 4
CLASS_PROBABILITIES = {1: 1.0, 2: 1.0, 3: 1.0}  # background (0) is never a center


@dataclass(frozen=True)
class Setup:
    """All that a contestant has to know. Goes to its process as JSON.

    Args:
        items: one ``{"image": path, "label": path}`` per volume.
        patch_size: edge of the cubic patches in voxels.
        samples_per_volume: patches of each volume in an epoch.
        queue_length: patches in the queue, for contestants that have one.
        batch_size: patches in a step of the consumer.
        num_workers: processes (threads, for loaders with threads) that prepare volumes.
        epochs: measured epochs, at least; one more is run before them and not counted.
        seconds: go on, by whole epochs, until so many have been measured.
        sleep: seconds that the second consumer sleeps after each step.
        paced: whether there is a second consumer.
        paced_seconds: like `seconds`, for the second consumer.
        seed: for contestants that take one.
        checked_volumes: the epoch that is checked has at most so many volumes.
    """

    items: Sequence[dict[str, str]]
    patch_size: int = 64
    samples_per_volume: int = 8
    queue_length: int = 48
    batch_size: int = 4
    num_workers: int = 2
    epochs: int = 4
    seconds: float = 0.0
    sleep: float = 0.05
    paced: bool = True
    paced_seconds: float = 0.0
    seed: int = 0
    checked_volumes: int = 100

    @property
    def patches_per_epoch(self) -> int:
        return len(self.items) * self.samples_per_volume

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Setup:
        values: dict[str, Any] = json.loads(text)
        return cls(**values)
