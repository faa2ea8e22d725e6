# SPDX-License-Identifier: Apache-2.0
"""Pipelines whose bottleneck is known: stages sleep, which stands for decoding and takes no processor time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import Any

import torch
from monai.data import Dataset
from monai.transforms import Compose, MapTransform
from monai.transforms.traits import MultiSampleTrait

from monai_patchqueue import PatchQueueLoader
from monai_patchqueue.queue.settings import LoaderSettings
from monai_patchqueue.queue.stats import QueueStats
from monai_patchqueue.report.diagnosis import Diagnosis, diagnose


class LoadSlowly(MapTransform):
    """Makes a volume, whose record says by how much more time it takes."""

    def __init__(self, seconds: float) -> None:
        super().__init__("image")
        self.seconds = seconds

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        time.sleep(self.seconds * data["slower"])
        return {"image": torch.zeros(1, 16, 16)}


class CutSlowly(MapTransform, MultiSampleTrait):
    """Gives patches, each of which takes a time."""

    def __init__(self, seconds: float, num_samples: int) -> None:
        super().__init__("image")
        self.seconds = seconds
        self.num_samples = num_samples

    def __call__(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        time.sleep(self.seconds * self.num_samples)
        return [{"image": data["image"].clone()} for _ in range(self.num_samples)]


class Sleep:
    """A transform of whatever comes."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, data: Any) -> Any:
        time.sleep(self.seconds)
        return data


class Compute:
    """A transform that keeps a processor busy for so long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, data: Any) -> Any:
        until = time.thread_time() + self.seconds
        while time.thread_time() < until:
            pass
        return data


@dataclass(frozen=True)
class Pipeline:
    """Stages with their times in seconds, and a loader's arguments.

    Args:
        load: per volume.
        cut: per patch, in the transform that cuts patches.
        augment: a transform of each patch in the workers.
        step: the consumer's work on a batch.
        volumes: per epoch.
        slow_ones: every so many volumes, one takes twelve times as long to load.
        arguments: of the loader.
    """

    load: float = 0.0
    cut: float = 0.0
    augment: Any = None
    step: float = 0.02
    volumes: int = 60
    slow_ones: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def changed(self, changes: Mapping[str, Any]) -> Pipeline:
        """The pipeline after an advice was followed."""
        return replace(self, arguments={**self.arguments, **changes})

    def loader(self) -> PatchQueueLoader:
        """A loader of this pipeline: four patches a batch, four a volume, if nothing else is said."""
        arguments = {"num_workers": 1, "batch_size": 4, "samples_per_volume": 4, "queue_length": 64, **self.arguments}
        records = [
            {"slower": 12 if self.slow_ones and number % self.slow_ones == 0 else 1} for number in range(self.volumes)
        ]
        stages = [LoadSlowly(self.load), CutSlowly(self.cut, arguments.pop("samples_per_volume"))]
        dataset = Dataset(records, Compose([*stages, *([self.augment] if self.augment else [])]))
        return PatchQueueLoader(dataset, shuffle=True, seed=0, batch_unit="patch", **arguments)

    def run(self, seconds: float = 0.9) -> tuple[QueueStats, LoaderSettings]:
        """Train on the pipeline for a while; its figures, and what they are to be judged with."""
        with self.loader() as loader:
            end = time.monotonic() + seconds
            for number, _ in enumerate(chain.from_iterable(repeat(loader))):
                time.sleep(self.step)
                if number > 20 and time.monotonic() > end:
                    break
            return loader.stats(), loader.settings()

    def diagnosis(self) -> Diagnosis:
        """What is said of a run."""
        return diagnose(*self.run())

    def diagnosis_when_calm(self, starved: float) -> Diagnosis:
        """What is said of the first of three runs that was starved no more than so, or else of the last.

        Other programs that keep all processors busy would starve any of them.
        """
        for _ in range(3):
            diagnosis = self.diagnosis()
            if diagnosis.starved <= starved:
                break
        return diagnosis
