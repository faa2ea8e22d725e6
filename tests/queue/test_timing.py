# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import CacheDataset, Dataset, PersistentDataset
from monai.transforms import Compose, MapTransform, OneOf, RandFlipd, RandSpatialCropSamplesd
from torch.utils.data import ConcatDataset, Subset

from monai_patchqueue.queue.timing import Stopwatch, pipeline_stages
from tests.pipelines import make_loader

ITEMS = [{"image": torch.full((1, 40, 40), float(i))} for i in range(4)]


class Slow(MapTransform):
    """Takes a known time."""

    def __init__(self, seconds: float) -> None:
        super().__init__("image")
        self.seconds = seconds

    def __call__(self, data: Any) -> Any:
        time.sleep(self.seconds)
        return data


class Slower(Slow):
    """The same under another name."""


class Slotted:
    """Has no place for another class."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, data: Any) -> Any:
        self.calls += 1
        time.sleep(0.02)
        return data


class PicklesItself(MapTransform):
    """As one does that hands itself to a process."""

    def __call__(self, data: Any) -> Any:
        for twin in (pickle.loads(pickle.dumps(self)), copy.deepcopy(self), copy.copy(self)):
            assert type(twin) is PicklesItself
            assert twin.keys == self.keys
        return data


class Failing(MapTransform):
    """Fails."""

    def __call__(self, data: Any) -> Any:
        raise OSError("broken file")


def sleep_in_function(data: Any, seconds: float = 0.02) -> Any:
    time.sleep(seconds)
    return data


def crop() -> RandSpatialCropSamplesd:
    return RandSpatialCropSamplesd("image", roi_size=(32, 32), num_samples=2)


def measured(dataset: Any, index: int = 0) -> dict[str, float]:
    with Stopwatch(dataset).running() as spent:
        dataset[index]
    return spent.transforms


def test_each_transform_has_its_own_time_in_the_pipelines_order() -> None:
    dataset = Dataset(ITEMS, Compose([Slow(0.01), Compose([Slower(0.03), crop()]), Slow(0.02)]))
    seconds = measured(dataset)
    assert list(seconds) == ["Dataset", "Slow", "Slower", "RandSpatialCropSamplesd", "Slow#2"]
    for name, expected in {"Slow": 0.01, "Slower": 0.03, "Slow#2": 2 * 0.02}.items():  # the last one sees two patches
        assert expected <= seconds[name] < 10 * expected


def test_time_that_no_transform_takes_is_the_datasets() -> None:
    class FromNetwork(Dataset):
        def __getitem__(self, index: int) -> Any:
            time.sleep(0.05)
            return super().__getitem__(index)

    seconds = measured(Subset(FromNetwork(ITEMS, Slow(0.01)), [2]))
    assert list(seconds) == ["FromNetwork", "Slow"]
    assert seconds["FromNetwork"] >= 0.05
    assert 0.01 <= seconds["Slow"] < 0.05


DATASETS: dict[str, Callable[[Path, Any], Any]] = {
    "a dataset in a dataset": lambda _, transform: Dataset(Dataset(ITEMS, Slow(0.02)), transform),
    "a persistent cache": lambda folder, transform: PersistentDataset(ITEMS, Compose([Slow(0.02), transform]), folder),
    "parts": lambda _, transform: ConcatDataset([Dataset(ITEMS[:2], Compose([Slow(0.02), transform]))] * 2),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_pipelines_within_datasets_are_found(kind: str, tmp_path: Path) -> None:
    dataset = DATASETS[kind](tmp_path, crop())
    seconds = measured(dataset)
    assert list(seconds)[1:] == ["Slow", "RandSpatialCropSamplesd"]
    assert seconds["Slow"] >= 0.02
    assert seconds["RandSpatialCropSamplesd"] > 0


def test_what_is_cached_takes_no_time() -> None:
    dataset = CacheDataset(ITEMS, Compose([Slow(0.01), crop()]), progress=False)
    seconds = measured(dataset)
    assert seconds["Slow"] == 0
    assert seconds["RandSpatialCropSamplesd"] > 0


def test_functions_partials_and_slotted_objects_are_timed_too() -> None:
    slotted = Slotted()
    dataset = Dataset(ITEMS, Compose([sleep_in_function, partial(sleep_in_function, seconds=0.03), slotted]))
    seconds = measured(dataset)
    assert list(seconds) == ["Dataset", "sleep_in_function", "sleep_in_function#2", "Slotted"]
    assert min(seconds["sleep_in_function"], seconds["Slotted"]) >= 0.02
    assert seconds["sleep_in_function#2"] >= 0.03
    assert slotted.calls == 1
    assert measured(Dataset(ITEMS, sleep_in_function))["sleep_in_function"] >= 0.02


def test_a_choice_between_transforms_is_one_stage_and_sampling_in_it_counts_as_sampling() -> None:
    dataset = Dataset(ITEMS, Compose([OneOf([Compose([Slow(0.02), crop()])]), Slower(0.01)]))
    with Stopwatch(dataset).running() as spent:
        dataset[0]
    assert list(spent.transforms) == ["Dataset", "OneOf", "Slower"]
    assert 0 < spent.sampling < spent.transforms["OneOf"] - 0.01


@pytest.mark.parametrize("transform", [Slow(0.0), Failing("image")])
def test_a_users_objects_are_as_they_were_afterwards(transform: MapTransform) -> None:
    inner = [transform, sleep_in_function, Slotted(), RandFlipd("image"), crop()]
    pipeline = Compose(inner)
    dataset = Dataset(ITEMS, pipeline)
    state = copy.copy(vars(pipeline)), copy.copy(vars(dataset)), [type(part) for part in inner]
    if isinstance(transform, Failing):
        with pytest.raises(RuntimeError, match="Failing"):
            measured(dataset)
    else:
        measured(dataset)
    assert (vars(pipeline), vars(dataset), [type(part) for part in inner]) == state
    assert pipeline.transforms[1] is sleep_in_function


def test_transforms_can_be_pickled_and_copied_while_they_are_timed() -> None:
    assert measured(Dataset(ITEMS, PicklesItself("image")))["PicklesItself"] > 0


def test_two_threads_that_time_the_same_objects_leave_them_as_they_were() -> None:
    dataset = Dataset(ITEMS, Compose([Slow(0.001), sleep_in_function]))
    pipeline, stages = dataset.transform, pipeline_stages(dataset)
    assert list(stages) == ["Slow", "sleep_in_function"]

    def often(_: int) -> None:
        for _ in range(10):
            measured(dataset)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(often, range(4)))
    assert type(stages["Slow"]) is Slow
    assert pipeline.transforms == (stages["Slow"], sleep_in_function)


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param({"num_workers": 0}, id="inline"),
        pytest.param({"num_workers": 2, "worker_type": "thread"}, id="threads"),
        pytest.param({"num_workers": 2}, id="processes"),
        pytest.param({"executor": ThreadPoolExecutor(2)}, id="executor"),
    ],
)
def test_the_workers_times_reach_the_statistics(workers: dict[str, Any]) -> None:
    dataset = Dataset(ITEMS, Compose([Slow(0.02), crop(), RandFlipd("image")]))
    arguments: dict[str, Any] = {
        "batch_size": 2,
        "patch_transform": Slow(0.005),
        "item_transform": Slow(0.01),
        "batch_transform": Slower(0.03),
    }
    with make_loader(dataset, **workers, **arguments) as loader:
        assert loader.stats().bottleneck == "unknown"
        for _ in loader:
            time.sleep(0.04)
        stats = loader.stats()
    seconds = stats.transform_seconds
    assert list(seconds) == ["Dataset", "Slow", "RandSpatialCropSamplesd", "RandFlipd", "patch_transform"]
    assert seconds["Slow"] >= 0.02
    assert seconds["patch_transform"] >= 2 * 0.005
    assert sum(seconds.values()) == pytest.approx(stats.load_seconds + stats.sample_seconds, rel=0.05)
    assert stats.item_transform_seconds >= 2 * 0.01
    assert stats.batch_transform_seconds >= 0.03
    assert stats.step_seconds >= 0.04
    assert stats.assemble_seconds > 0
    assert 0 < stats.worker_busy <= 1
    assert 0 < stats.assembly_busy <= 1
    assert stats.num_workers == (0 if workers.get("num_workers") == 0 else 2)


@pytest.mark.parametrize(
    ("transforms", "arguments", "step", "expected"),
    [
        pytest.param([Slow(0.001), Slower(0.05)], {}, 0.0, "workers:Slower", id="a transform"),
        pytest.param([], {"item_transform": Slow(0.03)}, 0.0, "item_transform", id="the item_transform"),
        pytest.param([], {"batch_transform": Slow(0.05)}, 0.0, "batch_transform", id="the batch_transform"),
        pytest.param([Slow(0.001)], {}, 0.06, "consumer", id="the consumer"),
    ],
)
@pytest.mark.parametrize("workers", [{"num_workers": 0}, {"num_workers": 1, "worker_type": "thread"}])
def test_the_slowest_stage_is_named(
    transforms: list[Any], arguments: dict[str, Any], step: float, expected: str, workers: dict[str, Any]
) -> None:
    dataset = Dataset(ITEMS * 2, Compose([*transforms, crop()]))
    with make_loader(dataset, **workers, batch_size=2, **arguments) as loader:
        for _ in loader:
            time.sleep(step)
        stats = loader.stats()
    if expected == "consumer" and workers["num_workers"] == 0:
        assert stats.starved < 0.3
    else:
        assert stats.bottleneck == expected, stats
