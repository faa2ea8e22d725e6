# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import RandFlipd

from monai_patchqueue import PatchQueueDataset, RandUniformPatchd
from tests.pipelines import Patches, drawn, every_patch, make_loader

COUNTS = [5, 1, 3, 7, 0, 2]


@pytest.mark.parametrize(
    "workers",
    [{}, {"num_workers": 2, "worker_type": "thread"}, {"num_workers": 2}],
    ids=["inline", "threads", "processes"],
)
def test_a_data_loader_over_it_gives_exact_epochs(workers: dict[str, Any]) -> None:
    with PatchQueueDataset(Patches(COUNTS), samples_per_volume="count", seed=0, **workers) as patches:
        loader = DataLoader(patches, batch_size=4)
        assert (len(patches), len(loader)) == (18, 5)
        epochs = [drawn(loader) for _ in range(2)]
        assert all(Counter(epoch) == every_patch(COUNTS) for epoch in epochs)
        assert epochs[0] != epochs[1]
        assert patches.stats().patches == 36


def test_its_patches_are_those_of_the_loader() -> None:
    patches = PatchQueueDataset(Patches(COUNTS), samples_per_volume="count", seed=3, queue_length=6)
    loader = make_loader(COUNTS, batch_size=1, shuffle=True, seed=3, queue_length=6)
    for _ in range(2):
        assert drawn(DataLoader(patches, batch_size=1)) == drawn(loader)


def test_a_data_loader_with_workers_is_refused_with_what_to_do() -> None:
    patches = PatchQueueDataset(Patches(COUNTS), samples_per_volume="count")
    iterator = iter(DataLoader(patches, num_workers=1))
    with pytest.raises(RuntimeError, match=r"num_workers=1(.|\n)*pass num_workers to PatchQueueDataset") as caught:
        next(iterator)
    traceback.clear_frames(caught.tb)  # they keep torch's iterator, and one that garbage collection ends waits for 5 s
    del iterator
    assert Counter(drawn(DataLoader(patches, batch_size=2))) == every_patch(COUNTS)


def test_records_and_a_transform_serve_as_well_as_a_dataset() -> None:
    records = [{"image": np.full((1, 20, 20, 20), i, np.float32)} for i in range(3)]
    crop = RandUniformPatchd("image", 12, 2)
    first = list(PatchQueueDataset(records, crop, seed=1))
    second = list(PatchQueueDataset(Dataset(records, crop), seed=1))
    assert len(first) == 6
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, second, strict=True))
    with pytest.raises(ValueError, match="transform only with a list"):
        PatchQueueDataset(Dataset(records, crop), RandFlipd("image"))


def test_volumes_and_patches_come_in_order_where_nothing_is_shuffled() -> None:
    patches = PatchQueueDataset(Patches(COUNTS), samples_per_volume="count", shuffle_volumes=False)
    assert drawn(DataLoader(patches, batch_size=5)) == sorted(every_patch(COUNTS))


def test_it_cannot_be_indexed_or_iterated_twice_at_once() -> None:
    patches = PatchQueueDataset(Patches(COUNTS), samples_per_volume="count")
    old, new = iter(patches), iter(patches)
    next(new)
    with pytest.raises(RuntimeError, match="newer iterator"):
        next(old)


def test_its_patches_belong_to_the_caller() -> None:
    patches = PatchQueueDataset(Patches(COUNTS), samples_per_volume="count", repeats=2, seed=0)
    kept = list(patches)
    for patch in kept:
        assert bool((patch["image"] == 1000.0 * patch["volume"] + patch["patch"]).all())
        patch["image"].fill_(-1)
    assert len({patch["image"].data_ptr() for patch in kept}) == 36


def test_set_epoch_and_repr() -> None:
    patches = PatchQueueDataset(Patches(COUNTS), samples_per_volume="count", seed=0)
    epochs = [drawn(DataLoader(patches)) for _ in range(2)]
    patches.set_epoch(1)
    assert drawn(DataLoader(patches)) == epochs[1]
    assert "patches_per_epoch=18" in repr(patches)
