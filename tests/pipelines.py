# SPDX-License-Identifier: Apache-2.0
"""Datasets, transforms and executors for tests, at module level so that they can be sent to any worker."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable
from torch.utils.data import Dataset

from monai_patchqueue import PatchQueueLoader


class Patches(Dataset, Randomizable):
    """Volumes whose patches say where they are from, what was drawn for them, and how often they were loaded.

    Args:
        counts: patches of each volume.
        log: file to which each loading adds a line with the volume's number.
        fault: called with the volume's number before it is loaded.
        size: length of a patch's sides.
    """

    def __init__(
        self,
        counts: Sequence[int],
        log: Path | None = None,
        fault: Callable[[int], object] | None = None,
        size: int = 32,
    ) -> None:
        self.data = [{"image": f"case_{i}.nii.gz", "count": count} for i, count in enumerate(counts)]
        self.log = log
        self.fault = fault
        self.size = size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        if self.log is not None:
            append_line(self.log, index)
        if self.fault is not None:
            self.fault(index)
        noise = self.R.random(self.data[index]["count"])
        return [
            {
                "image": torch.full((1, self.size, self.size), 1000.0 * index + patch),
                "volume": index,
                "patch": patch,
                "noise": float(noise[patch]),
            }
            for patch in range(self.data[index]["count"])
        ]


def append_line(path: Path, content: object) -> None:
    """Add a line to a file, whole, whichever processes do so at the same time."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{content}\n".encode())
    finally:
        os.close(file)


def lines(path: Path) -> list[str]:
    """What was added to a file so far."""
    return path.read_text().split() if path.exists() else []


def make_loader(dataset: Dataset | Sequence[int], num_workers: int = 0, **arguments: Any) -> PatchQueueLoader:
    """A loader of :class:`Patches` (or counts for them) with a seed; keyword arguments go before its defaults."""
    if not isinstance(dataset, Dataset):
        dataset = Patches(dataset)
    if isinstance(dataset, Patches):
        arguments.setdefault("samples_per_volume", "count")
    return PatchQueueLoader(dataset, num_workers, **{"batch_unit": "patch", "seed": 0, **arguments})


def drawn(batches: Iterable[dict[str, Any]]) -> list[tuple[int, int]]:
    """Volume and patch of each draw in batches of :class:`Patches`, having seen that slots hold what records say."""
    draws = []
    for batch in batches:
        for image, volume, patch in zip(batch["image"], batch["volume"].tolist(), batch["patch"].tolist(), strict=True):
            assert bool((image == 1000.0 * volume + patch).all()), (volume, patch, image.unique())
            draws.append((volume, patch))
    return draws


def every_patch(counts: Sequence[int], repeats: int = 1) -> Counter[tuple[int, int]]:
    """What an exact epoch draws."""
    return Counter({(v, p): repeats for v, count in enumerate(counts) for p in range(count)})


def goes_on(loader: PatchQueueLoader, counts: list[int]) -> None:
    """Whole epochs follow, once volumes that were prepared ahead, and had failed too, have been heard of."""
    for _ in range(2):
        with suppress(Exception):
            drawn(loader)
    for _ in range(2):
        assert Counter(drawn(loader)) == every_patch(counts)


def digest(batches: Iterable[dict[str, Any]]) -> str:
    """A hash of all that is in batches, to the bit."""
    sha = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            sha.update(key.encode())
            _update(sha, batch[key])
    return sha.hexdigest()


def _update(sha: Any, value: Any) -> None:
    if isinstance(value, MetaTensor):
        sha.update(value.affine.double().numpy().tobytes())
        for key in sorted(map(str, value.meta)):
            sha.update(f"{key} {value.meta.get(key)}".encode())
        sha.update(repr(_classes(value.applied_operations)).encode())
        value = value.as_tensor()
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else repr(value).encode())
    else:
        sha.update(repr(value).encode())


def _classes(operations: Any) -> Any:
    """The classes that traces name; the rest of a trace has identities of objects, and times."""
    if isinstance(operations, list):
        return [_classes(part) for part in operations]
    return operations.get("class") if isinstance(operations, dict) else operations


# -- transforms


class Sleepy(MapTransform):
    """Takes a time that nothing decides, so that workers finish in another order each run."""

    def __init__(self, keys: Any = "image", most: float = 0.01) -> None:
        super().__init__(keys)
        self.most = most

    def __call__(self, data: Any) -> Any:
        time.sleep(random.Random(os.urandom(8)).random() * self.most)
        return data


class GlobalNoise(MapTransform):
    """Noise from the global generators of Python, numpy and torch."""

    def __call__(self, data: Any) -> Any:
        data = dict(data)
        for key in self.keys:
            number = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
            data[key] = data[key] + number
        return data


class OwnGenerators(MapTransform):
    """Noise from generators that the transform holds."""

    def __init__(self, keys: Any) -> None:
        super().__init__(keys)
        self.python = random.Random()
        self.numpy = np.random.default_rng()
        self.legacy = np.random.RandomState()
        self.torch = torch.Generator()

    def __call__(self, data: Any) -> Any:
        data = dict(data)
        for key in self.keys:
            number = self.python.random() + self.numpy.random() + self.legacy.rand()
            data[key] = data[key] + number + torch.rand((), generator=self.torch)
        return data


class Do(MapTransform):
    """Calls a function for its effect."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__(())
        self.action = action

    def __call__(self, data: Any) -> Any:
        self.action()
        return data


def add_one(item: dict[str, Any]) -> dict[str, Any]:
    """A transform that works in place."""
    item["image"] += 1
    return item


class SlowCounts(Executor):
    """An executor that runs everything at once and does not say how much it can do."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future
