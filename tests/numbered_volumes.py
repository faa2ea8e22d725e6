# SPDX-License-Identifier: Apache-2.0
"""Data modules over volumes that say which they are and how often they were loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from monai_patchqueue import PatchDataModule, RandUniformPatchd


class Numbered:
    """A loader of volumes that are filled with their record's number; ``loaded`` lists these numbers.

    Args:
        size: length of a volume's sides.
        broken: a number whose volume cannot be loaded.
    """

    def __init__(self, size: int = 16, broken: int | None = None) -> None:
        self.size = size
        self.broken = broken
        self.loaded: list[int] = []

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        self.loaded.append(record["number"])
        if record["number"] == self.broken:
            raise OSError("this file is cut off")
        volume = np.full((1, self.size, self.size), record["number"], np.float32)
        return {**record, "image": volume, "label": volume.copy()}


def records(numbers: Iterable[int], classes: Sequence[Any] = ("a", "b")) -> list[dict[str, Any]]:
    """Records with a number and, by turns, a class."""
    return [{"number": number, "class": classes[number % len(classes)]} for number in numbers]


def crop(num_samples: int | str = 4) -> RandUniformPatchd:
    """Patches of side 8."""
    return RandUniformPatchd(["image", "label"], 8, num_samples=num_samples)  # type: ignore[arg-type]


def make_module(
    train: int | Any = 6, others: Sequence[str] = ("validation", "test"), **arguments: Any
) -> PatchDataModule:
    """A module over numbered volumes: as many, or the splits' parts, for training; three for each of the others."""
    load = Numbered()
    splits: dict[str, Any] = {name: [(records(range(100, 103)), load)] for name in others}
    splits["train"] = [(records(range(train)), load)] if isinstance(train, int) else train
    defaults = {"batch_size": 4, "train_transforms": crop(), "seed": 0, "progress": False}
    return PatchDataModule(splits, **{**defaults, **arguments})


def numbers(batches: Iterable[dict[str, Any]]) -> list[int]:
    """The numbers of the volumes that batches are from, having seen that images and labels are theirs."""
    found = []
    for batch in batches:
        for image, label, number in zip(batch["image"], batch["label"], batch["number"].tolist(), strict=True):
            assert bool((image == number).all())
            assert bool((label == number).all())
            found.append(number)
    return found
