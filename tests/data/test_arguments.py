# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, Dataset, IterableDataset, SmartCacheDataset
from monai.transforms import (
    ClassesToIndicesd,
    Compose,
    FgBgToIndicesd,
    GridSplitd,
    RandCropByLabelClassesd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandSpatialCropd,
    RandSpatialCropSamplesd,
    RandWeightedCropd,
    SplitDimd,
)
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, Subset

from monai_patchqueue import GridPatchSamplesd, PatchQueueLoader, RandLabelPatchd, RandUniformPatchd
from monai_patchqueue.data.volumes import count_patches, volume_name
from tests.pipelines import Patches, add_one, make_loader
from tests.volumes import blobs


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size=0: expected 1 or more"),
        ({"batch_size": 2.5}, TypeError, "batch_size=2.5"),
        ({"batch_size": True}, TypeError, "batch_size=True"),
        ({"batch_size": None}, TypeError, "batch_size=None"),
        ({"batch_unit": "case"}, ValueError, "'patch' or 'volume'"),
        ({"queue_length": 0}, ValueError, "queue_length=0"),
        ({"queue_length": 1.5}, TypeError, "queue_length=1.5"),
        ({"warmup": 0}, ValueError, "warmup=0"),
        ({"repeats": 0}, ValueError, "repeats=0"),
        ({"repeats": None}, TypeError, "repeats=None"),
        ({"num_workers": -1}, ValueError, "num_workers=-1"),
        ({"num_workers": "2"}, TypeError, "num_workers='2'"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"seed": 1.5}, TypeError, "seed=1.5"),
        ({"queue_length": 8, "ram_budget": 0.5}, ValueError, "queue_length and ram_budget exclude"),
        ({"ram_budget": "lots"}, ValueError, "'lots'"),
        ({"ram_budget": 100}, ValueError, "allows a queue of 100.0 B"),
        ({"worker_type": "fibre"}, ValueError, "'fibre'.*'process' or 'thread'"),
        ({"multiprocessing_context": "clone"}, ValueError, "'clone'.*fork"),
        ({"volume_timeout": 5}, ValueError, "volume_timeout needs workers"),
        ({"volume_timeout": -1, "num_workers": 1}, ValueError, "volume_timeout=-1"),
        ({"timeout": -1}, ValueError, "timeout=-1"),
        ({"shuffle": True, "sampler": [0]}, ValueError, "exclude each other"),
        ({"prefetch_factor": 2}, ValueError, "queue_length decides"),
        ({"batch_sampler": [[0]]}, ValueError, "batch_sampler is not supported"),
        ({"in_order": False}, ValueError, "in_order"),
        ({"pin_memory_device": "xpu"}, ValueError, "pin_memory_device='xpu'.*CUDA"),
        ({"collate_fn": "list"}, TypeError, "collate_fn is a str"),
        ({"patch_transform": 3}, TypeError, "patch_transform is a int"),
        ({"item_transform": 3}, TypeError, "item_transform"),
        ({"batch_transform": 3}, TypeError, "batch_transform"),
        ({"worker_init_fn": 3}, TypeError, "worker_init_fn"),
        ({"executor": "threads"}, TypeError, "concurrent.futures.Executor"),
        ({"samples_per_volume": 0}, ValueError, "no volume gives any patch"),
        ({"samples_per_volume": -2}, ValueError, "-2"),
        ({"samples_per_volume": 2.0}, ValueError, r"2\.0 for volume 0 .case_0"),
        ({"samples_per_volume": "image"}, ValueError, "'case_0.nii.gz' for volume 0"),
        ({"batch_size": 100, "drop_last": True}, ValueError, "fewer than batch_size=100"),
        ({"sampler": iter([0, 1])}, TypeError, r"no len\(\)"),
        ({"on_error": "ignore"}, ValueError, "on_error='ignore'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_refused_by_name(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_loader([4] * 4, **arguments)


def test_an_executor_and_workers_of_our_own_exclude_each_other() -> None:
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="executor and num_workers exclude"):
            make_loader([4], 1, executor=pool)
        with pytest.raises(ValueError, match="volume_timeout"):
            make_loader([4], executor=pool, volume_timeout=3)


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (IterableDataset([{"a": 1}]), TypeError, "IterableDataset is not map-style"),
        (SmartCacheDataset([{"a": 1}] * 4, None, 0.5, progress=False), TypeError, "SmartCacheDataset replaces"),
        (Dataset([]), ValueError, "empty"),
        ((item for item in "ab"), TypeError, "not map-style"),
    ],
    ids=["iterable", "smart cache", "empty", "generator"],
)
def test_a_dataset_that_cannot_serve_is_refused(dataset: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PatchQueueLoader(dataset, samples_per_volume=1)


def test_arguments_are_public_attributes_with_the_values_given() -> None:
    dataset = Patches([4] * 4)
    given: dict[str, Any] = {
        "dataset": dataset,
        "num_workers": 2,
        "batch_size": 3,
        "sampler": RandomSampler(dataset),  # type: ignore[arg-type]
        "queue_length": 7,
        "samples_per_volume": "count",
        "shuffle_patches": False,
        "warmup": 2,
        "worker_type": "thread",
        "multiprocessing_context": "spawn",
        "persistent_workers": False,
        "patch_transform": add_one,
        "drop_last": True,
        "repeats": 2,
        "seed": 4,
        "volume_timeout": 9.0,
        "batch_unit": "patch",
        "timeout": 5,
    }
    loader = PatchQueueLoader(**given)
    for name, value in given.items():
        assert getattr(loader, name) == value, name
    for name, parameter in inspect.signature(PatchQueueLoader).parameters.items():
        assert name in given or getattr(loader, name) is parameter.default, name
    assert isinstance(loader, DataLoader)
    # As Lightning does: anew from the signature and the attributes.
    names = inspect.signature(PatchQueueLoader).parameters
    again = PatchQueueLoader(**{name: getattr(loader, name) for name in names if name != "sampler"}, sampler=[1, 2])
    assert (again.queue_length, again.sampler, len(again)) == (7, [1, 2], 5)


# -- how many patches a volume gives

VOLUMES = [
    {"image": blobs(24, 24, 24, seed=i).astype(np.float32), "label": blobs(24, 24, 24, seed=i)} for i in range(3)
]
KEYS = ["image", "label"]


@pytest.mark.parametrize(
    "crop",
    [
        RandCropByPosNegLabeld(KEYS, "label", (8, 8, 8), num_samples=3),
        RandSpatialCropSamplesd(KEYS, 8, 3, random_size=False),
        RandWeightedCropd(KEYS, "image", (8, 8, 8), 3),
        RandCropByLabelClassesd(KEYS, "label", (8, 8, 8), num_classes=4, num_samples=3),
        RandUniformPatchd(KEYS, 8, 3),
        RandLabelPatchd(KEYS, "label", 8, 3),
        RandSpatialCropd(KEYS, 8, random_size=False),
        GridPatchSamplesd(KEYS, 8),
    ],
    ids=lambda crop: type(crop).__name__,
)
def test_counts_are_read_off_the_transforms(crop: Any) -> None:
    dataset = Dataset(VOLUMES, Compose([crop, RandFlipd("image", prob=0.5)]))
    items = [dataset[index] for index in range(3)]
    expected = [len(item) if isinstance(item, list) else 1 for item in items]
    assert count_patches(dataset, None).tolist() == expected


@pytest.mark.parametrize(
    "before",
    [FgBgToIndicesd("label"), ClassesToIndicesd("label", num_classes=4), SplitDimd("image", dim=3)],
    ids=lambda transform: type(transform).__name__,
)
def test_transforms_that_give_lists_within_an_item_are_no_samplers(before: Any) -> None:
    pipeline = Compose([before, RandSpatialCropSamplesd("image", 8, 3, random_size=False)])
    dataset = Dataset(VOLUMES, pipeline)
    assert count_patches(dataset, None).tolist() == [len(dataset[index]) for index in range(3)] == [3, 3, 3]


def test_counts_of_a_split_image_are_read_off_the_transform() -> None:
    images = Dataset([{"image": np.zeros((1, 24, 24), np.float32)}], GridSplitd("image", grid=(2, 3), size=8))
    assert count_patches(images, None).tolist() == [len(images[0])] == [6]


def test_counts_are_read_off_nested_datasets() -> None:
    records = [{"image": f"{i}.nii", "n": i} for i in range(4)]
    one = Dataset(records, RandUniformPatchd("image", 8, num_samples="n", default_num_samples=2))
    two = CacheDataset(
        [{"image": 1}, {"image": 2, "n": 9}], Compose([RandFlipd("image")]), cache_rate=0, progress=False
    )
    both = ConcatDataset([one, two])
    assert count_patches(one, None).tolist() == [0, 1, 2, 3]
    assert count_patches(both, None).tolist() == [0, 1, 2, 3, 1, 1]
    assert count_patches(Subset(both, [3, 5, 2]), None).tolist() == [3, 1, 2]
    assert count_patches(Subset(both, [3, 5, 2]), "n").tolist() == [3, 9, 2]
    assert count_patches(Dataset(Subset(one, [3, 1]), RandFlipd("image")), None).tolist() == [3, 1]
    assert count_patches(both, lambda record: record.get("n", 5)).tolist() == [0, 1, 2, 3, 5, 9]
    assert [volume_name(both, index) for index in (0, 4)] == ["volume 0 (0.nii)", "volume 4"]


class Bare(torch.utils.data.Dataset):
    """Shows nothing of its volumes."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.zeros(1, 40, 40)}


@pytest.mark.parametrize(
    ("dataset", "samples", "message"),
    [
        (Bare(), None, "Bare does not show.*samples_per_volume"),
        (Bare(), "n", "Bare has no 'data'"),
        (Bare(), lambda record: 3, "Bare has no 'data'"),
        (Dataset(VOLUMES, Compose([RandUniformPatchd(KEYS, 8, 2), RandSpatialCropSamplesd(KEYS, 8, 2)])), None, "nest"),
    ],
)
def test_counts_that_cannot_be_known_are_refused_at_construction(dataset: Any, samples: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchQueueLoader(dataset, samples_per_volume=samples)


def test_a_count_that_needs_the_loaded_item_is_refused_at_construction() -> None:
    by_shape = RandUniformPatchd("image", 8, num_samples=lambda item: item["image"].shape[1] // 8)
    with pytest.raises(ValueError, match=r"num_samples.*volume 0 \(a.nii\)"):
        PatchQueueLoader(Dataset([{"image": "a.nii"}], by_shape))


def test_a_dataset_that_shows_nothing_serves_with_a_number() -> None:
    assert len(list(make_loader(Bare(), samples_per_volume=1, batch_size=2))) == 2
