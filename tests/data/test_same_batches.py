# SPDX-License-Identifier: Apache-2.0
"""One seed, the same batches to the bit, whoever prepares the volumes."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, Dataset
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Lambdad,
    LoadImaged,
    NormalizeIntensityd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoise,
    RandGaussianNoised,
    RandSpatialCropSamplesd,
    RandZoomd,
)
from monai.utils import set_determinism
from torch.utils.data import ConcatDataset, Subset

from tests.pipelines import GlobalNoise, OwnGenerators, Patches, Sleepy, SlowCounts, add_one, digest, make_loader
from tests.volumes import blobs

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Three cases of image and label on disk."""
    folder = tmp_path_factory.mktemp("cases")
    records = []
    for case in range(3):
        rng = np.random.default_rng(case)
        image = rng.integers(0, 1000, (60, 58, 56)).astype(np.int16)
        affine = np.diag([1.0, 1.5, 2.0, 1.0])
        record = {"image": str(folder / f"image_{case}.nii.gz"), "label": str(folder / f"label_{case}.nii.gz")}
        nib.save(nib.Nifti1Image(image, affine), record["image"])
        nib.save(nib.Nifti1Image(blobs(60, 58, 56, seed=case)[0], affine), record["label"])
        records.append(record)
    return records


def stock_pipeline(records: list[dict[str, str]]) -> Dataset:
    keys = ["image", "label"]
    transforms = [
        LoadImaged(keys),
        EnsureChannelFirstd(keys),
        NormalizeIntensityd("image"),
        Sleepy(keys, most=0.05),
        RandCropByPosNegLabeld(keys, "label", spatial_size=(48, 48, 32), pos=1, neg=1, num_samples=3),
        RandAffined(keys, prob=1.0, rotate_range=0.3, scale_range=0.1, mode=("bilinear", "nearest")),
        RandGaussianNoised("image", prob=0.5),
        RandFlipd(keys, prob=0.5, spatial_axis=0),
    ]
    return Dataset(records, Compose(transforms))


def two_epochs(dataset: Any, num_workers: int = 0, **arguments: Any) -> str:
    arguments = {"batch_size": 2, "shuffle": True, "queue_length": 5, **arguments}
    with make_loader(dataset, num_workers, **arguments) as loader:
        return digest(batch for _ in range(2) for batch in loader)


@pytest.fixture(scope="module")
def expected(files: list[dict[str, str]]) -> str:
    """What the pipeline gives in the calling process."""
    return two_epochs(stock_pipeline(files))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_workers", "arguments"),
    [
        (0, {}),
        (1, {"worker_type": "thread"}),
        (2, {"worker_type": "thread"}),
        (4, {"worker_type": "thread"}),
        (1, {"multiprocessing_context": "fork"}),
        (4, {"multiprocessing_context": "fork"}),
        (2, {"multiprocessing_context": "forkserver"}),
        (1, {"multiprocessing_context": "spawn"}),
    ],
)
def test_a_stock_pipeline_gives_the_same_bits_with_any_workers(
    num_workers: int, arguments: dict[str, Any], files: list[dict[str, str]], expected: str
) -> None:
    assert two_epochs(stock_pipeline(files), num_workers, **arguments) == expected


def fork_pool() -> Executor:
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork"))


@pytest.mark.slow
@pytest.mark.parametrize("pool", [lambda: ThreadPoolExecutor(2), fork_pool, SlowCounts])
def test_a_stock_pipeline_gives_the_same_bits_in_an_executor(
    pool: Callable[[], Executor], files: list[dict[str, str]], expected: str
) -> None:
    with pool() as executor:
        assert two_epochs(stock_pipeline(files), executor=executor) == expected


def test_another_seed_or_epoch_gives_other_batches() -> None:
    dataset = cropped(RandGaussianNoised("image", prob=1.0))
    with make_loader(dataset, batch_size=4) as loader:
        first, second = digest(loader), digest(loader)
        loader.set_epoch(0)
        assert digest(loader) == first
    assert first != second
    assert two_epochs(dataset, seed=1) != two_epochs(dataset, seed=2)
    assert two_epochs(dataset, seed=1) == two_epochs(dataset, seed=1)


# -- small pipelines, each with another home for its randomness


def cropped(*transforms: Any, number: int = 12) -> Dataset:
    """Small random volumes, cropped, then transformed."""
    rng = np.random.default_rng(0)
    volumes = [{"image": rng.random((1, 20, 20, 20), np.float32), "number": i} for i in range(number)]
    return Dataset(volumes, Compose([RandSpatialCropSamplesd("image", 16, 3, random_size=False), *transforms]))


INLINE: dict[str, Any] = {}
PROCESSES = {"num_workers": 2}
THREADS = {"num_workers": 4, "worker_type": "thread"}


@pytest.mark.parametrize("workers", [PROCESSES, {"num_workers": 4}])
def test_global_generators_are_seeded_for_each_volume_inline_and_in_processes(workers: dict[str, Any]) -> None:
    dataset = cropped(GlobalNoise("image"), Sleepy())
    random.seed(1)
    expected_bits = two_epochs(dataset)
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert two_epochs(dataset) == expected_bits
    assert two_epochs(dataset, **workers) == expected_bits


@pytest.mark.parametrize("workers", [PROCESSES, THREADS])
def test_generators_that_transforms_hold_are_seeded_for_each_volume(workers: dict[str, Any]) -> None:
    dataset = cropped(OwnGenerators("image"), Sleepy())
    assert two_epochs(dataset, **workers) == two_epochs(cropped(OwnGenerators("image"), Sleepy()))


def noisy_twice(noise: RandGaussianNoise) -> Callable[[Any], Any]:
    def twice(image: Any) -> Any:
        image = noise(image)
        time.sleep(0.002)
        return noise(image)

    return twice


@pytest.mark.parametrize("workers", [PROCESSES, THREADS])
def test_random_transforms_in_closures_are_seeded_for_each_volume(workers: dict[str, Any]) -> None:
    digests = {
        two_epochs(cropped(Lambdad("image", noisy_twice(RandGaussianNoise(prob=1.0)))), **arguments)
        for arguments in (INLINE, workers, workers)
    }
    assert len(digests) == 1


class OwnRandomness(torch.utils.data.Dataset):
    """A dataset that draws from a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        first = self.rng.random()
        time.sleep(0.003)
        return {"image": torch.full((1, 40, 40), first + self.rng.random())}


@pytest.mark.parametrize("workers", [PROCESSES, THREADS])
def test_a_datasets_own_generator_is_seeded_for_each_volume(workers: dict[str, Any]) -> None:
    digests = {
        two_epochs(OwnRandomness(), samples_per_volume=1, **arguments) for arguments in (INLINE, workers, workers)
    }
    assert len(digests) == 1


def nested() -> Iterator[tuple[str, Any, int | None]]:
    noise = RandGaussianNoised("image", prob=1.0)
    yield "subset", Subset(cropped(noise, number=20), list(range(0, 20, 2))), None
    yield "concatenated", ConcatDataset([cropped(noise), cropped(RandZoomd("image", prob=1.0), Sleepy())]), None
    plain = cropped(noise)
    yield "cached", CacheDataset(plain.data, plain.transform, progress=False), None
    yield "dataset of a dataset", Dataset(Dataset(plain.data, noise), plain.transform), None
    yield "twice the same transforms", ConcatDataset([plain, plain]), None
    yield "randomizable dataset", Patches([3] * 8), 3


@pytest.mark.parametrize(("dataset", "count"), [pytest.param(*rest, id=name) for name, *rest in nested()])
@pytest.mark.parametrize("workers", [PROCESSES, THREADS])
def test_randomness_is_found_in_nested_datasets(dataset: Any, count: int | None, workers: dict[str, Any]) -> None:
    assert two_epochs(dataset, samples_per_volume=count, **workers) == two_epochs(dataset, samples_per_volume=count)


@pytest.mark.parametrize("workers", [INLINE, PROCESSES, THREADS])
def test_every_stage_of_transforms_is_random_by_seed_alone(workers: dict[str, Any]) -> None:
    def stages() -> dict[str, Any]:
        return {
            "patch_transform": RandGaussianNoised("image", prob=1.0),
            "item_transform": Compose([RandGaussianNoised("image", prob=1.0), OwnGenerators("image")]),
            "batch_transform": RandGaussianNoised("image", prob=0.5),
            "repeats": 2,
        }

    assert two_epochs(cropped(), **workers, **stages()) == two_epochs(cropped(), **stages())
    without = {**stages(), "item_transform": None}
    assert two_epochs(cropped(), **workers, **without) != two_epochs(cropped(), **stages())


def test_an_item_transform_gives_each_repetition_of_a_patch_its_own_randomness() -> None:
    noise = RandGaussianNoised("image", prob=1.0)
    batches = list(make_loader(cropped(number=4), batch_size=6, repeats=4, item_transform=noise))
    images = torch.cat([batch["image"] for batch in batches])
    assert len(images) == 4 * 3 * 4
    assert len(images.reshape(48, -1).unique(dim=0)) == 48


def test_an_item_transform_that_works_in_place_does_not_reach_the_queue() -> None:
    loader = make_loader([2] * 4, batch_size=4, repeats=3, item_transform=add_one, queue_length=100)
    for batch in loader:
        assert torch.equal(batch["image"][:, 0, 0, 0], 1000.0 * batch["volume"] + batch["patch"] + 1)


def test_torch_and_monai_decide_the_seed_where_none_is_given() -> None:
    def bits() -> str:
        return two_epochs(cropped(RandGaussianNoised("image", prob=1.0)), seed=None)

    state = torch.get_rng_state()
    try:
        torch.manual_seed(5)
        first = bits()
        torch.rand(3)
        assert bits() == first
        torch.manual_seed(6)
        assert bits() != first
        torch.manual_seed(5)
        assert bits() == first
        set_determinism(5)
        assert bits() == first
    finally:
        set_determinism(None)
        torch.set_rng_state(state)


@pytest.mark.slow
def test_batches_do_not_depend_on_pythons_hash_seed(tmp_path: Path) -> None:
    program = (
        "from tests.data.test_same_batches import *\n"
        "print(two_epochs(cropped(OwnGenerators('image'), RandGaussianNoised('image', prob=1.0))))"
    )
    expected_bits = two_epochs(cropped(OwnGenerators("image"), RandGaussianNoised("image", prob=1.0)))
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split()[-1:] == [expected_bits], done.stderr


def test_batches_under_a_memory_budget_do_not_depend_on_the_number_of_workers() -> None:
    bits = {
        two_epochs([4] * 32, workers, queue_length=None, ram_budget=300 * 1024, worker_type="thread")
        for workers in (1, 3)
    }
    assert len(bits) == 1
