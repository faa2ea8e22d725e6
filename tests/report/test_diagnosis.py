# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from monai.data import Dataset
from monai.transforms import Compose, EnsureTyped, Identityd, RandFlip

from monai_patchqueue import PatchQueueLoader, RandUniformPatchd, diagnose
from monai_patchqueue.queue.settings import LoaderSettings
from monai_patchqueue.queue.stats import QueueStats
from tests.report.slow_pipelines import Compute, Pipeline, Sleep

TEN = Sleep(0.01)
INLINE, THREADS = {"num_workers": 0}, {"worker_type": "thread"}

# Pipelines with their bottleneck, and what is to be changed by the first advice.
STARVED = {
    "nothing prepared ahead": (Pipeline(load=0.04, arguments=INLINE), "inline:LoadSlowly", {"num_workers"}),
    "one worker": (Pipeline(load=0.04), "workers:LoadSlowly", {"num_workers"}),
    "two workers": (Pipeline(load=0.12, arguments={"num_workers": 2}), "workers:LoadSlowly", {"num_workers"}),
    "threads": (Pipeline(load=0.06, arguments=THREADS), "workers:LoadSlowly", {"num_workers"}),
    "no volume left for another worker": (
        Pipeline(load=0.05, volumes=2, arguments={"num_workers": 2, "queue_length": 8}),
        "workers:LoadSlowly",
        {"samples_per_volume", "queue_length"},
    ),
    "cutting": (Pipeline(cut=0.012), "workers:CutSlowly", {"num_workers"}),
    "augmentation": (Pipeline(augment=Sleep(0.012)), "workers:Sleep", {"num_workers"}),
    "patch_transform": (
        Pipeline(arguments={"patch_transform": Sleep(0.012)}),
        "workers:patch_transform",
        {"num_workers"},
    ),
    "item_transform": (
        Pipeline(arguments={"item_transform": TEN, "num_workers": 5}),
        "item_transform",
        {"item_transform", "patch_transform"},
    ),
    "loading and item_transform alike": (
        Pipeline(load=0.04, arguments={"item_transform": TEN}),
        "workers:LoadSlowly",
        {"item_transform", "patch_transform", "num_workers"},
    ),
    "loading and cutting alike": (Pipeline(load=0.025, cut=0.006), "workers:LoadSlowly", {"num_workers"}),
    "loading and augmentation alike": (
        Pipeline(load=0.028, augment=Sleep(0.006), arguments=INLINE),
        "inline:LoadSlowly",
        {"num_workers"},
    ),
    "workers that start anew": (
        Pipeline(load=0.06, volumes=12, arguments={"persistent_workers": False, "num_workers": 8}),
        "epochs",
        {"persistent_workers"},
    ),
    "a few slow volumes": (
        Pipeline(load=0.02, slow_ones=10, arguments={"num_workers": 4}),
        "uneven",
        {"num_workers"},
    ),
}


@pytest.mark.parametrize("name", STARVED)
def test_the_bottleneck_is_named_and_following_the_advice_halves_the_waiting_at_least(name: str) -> None:
    pipeline, cause, changed = STARVED[name]
    before = pipeline.diagnosis()
    assert cause in before.causes
    assert before.starved > 0.1
    assert set(before.advice[0].changes) == changed
    after = pipeline.changed(before.advice[0].changes).diagnosis_when_calm(before.starved / 2)
    assert after.starved <= before.starved / 2, (str(before), str(after))


def test_each_of_several_alternatives_does_by_itself() -> None:
    pipeline = Pipeline(load=0.06)
    before = pipeline.diagnosis()
    assert [sorted(advice.changes) for advice in before.advice] == [
        ["num_workers"],
        ["queue_length", "samples_per_volume"],
        [],
    ]
    assert before.advice[2].text == "the chunked store (ChunkedDataset)"
    after = pipeline.changed(before.advice[1].changes).diagnosis_when_calm(before.starved / 2)
    assert after.starved <= before.starved / 2


@pytest.mark.parametrize(
    "pipeline",
    [Pipeline(load=0.01), Pipeline(load=0.03, step=0.1, arguments=THREADS), Pipeline(step=0.1, arguments=INLINE)],
    ids=["one worker", "a thread", "inline"],
)
def test_nothing_is_advised_when_all_is_well(pipeline: Pipeline) -> None:
    diagnosis = pipeline.diagnosis_when_calm(0.04)
    assert not diagnosis.advice
    assert not diagnosis.causes
    assert "all is well" in str(diagnosis)


def test_what_no_setting_can_help_is_named_without_advice() -> None:
    diagnosis = Pipeline(load=0.04, arguments={"batch_transform": Sleep(0.04)}).diagnosis()
    assert {"workers:LoadSlowly", "batch_transform"} == set(diagnosis.causes)
    assert not diagnosis.advice
    assert "No setting" in str(diagnosis)


def test_processor_time_is_told_from_waiting() -> None:
    computing, _ = Pipeline(augment=Compute(0.005)).run(0.5)
    waiting, _ = Pipeline(augment=Sleep(0.005)).run(0.5)
    assert 0.02 <= computing.cpu_seconds < 0.04
    assert waiting.cpu_seconds < 0.01
    assert waiting.load_seconds > 0.02
    assert waiting.max_volume_seconds >= waiting.load_seconds


@pytest.mark.parametrize("workers", [INLINE, THREADS, {}], ids=["inline", "threads", "processes"])
def test_the_consumers_processor_time_leaves_out_the_workers(workers: dict[str, Any]) -> None:
    with Pipeline(augment=Compute(0.005), volumes=8, arguments=workers).loader() as loader:
        for _ in loader:
            Compute(0.02)(None)
        stats = loader.stats()
    # The last batch's own work is not waited for.
    assert 0.015 < stats.consumer_cpu_seconds < 0.035


STATS = QueueStats(
    batches=400,
    volumes=400,
    seconds=16.0,
    volumes_per_second=25.0,
    wait_seconds=0.03,
    load_seconds=0.08,
    cpu_seconds=0.08,
    max_volume_seconds=0.08,
    transform_seconds={"Dataset": 0.0, "LoadImaged": 0.06, "RandRotated": 0.02},
    assemble_seconds=0.001,
    step_seconds=0.01,
)
SETTINGS = LoaderSettings(
    num_workers=2, samples_per_volume=4, batch_size=4, queue_length=64, volumes=100, cpus=2.0, patch_nbytes=2**20
)


def changes(stats: QueueStats, settings: LoaderSettings) -> list[dict[str, Any]]:
    return [dict(advice.changes) for advice in diagnose(stats, settings).advice]


def test_workers_beyond_the_processors_are_advised_only_where_they_wait_for_storage() -> None:
    waiting = replace(STATS, cpu_seconds=0.01)
    assert changes(waiting, SETTINGS)[0] == {"num_workers": 10}
    assert all("num_workers" not in each or each["num_workers"] <= 2 for each in changes(STATS, SETTINGS))
    assert "cpus" in diagnose(STATS, SETTINGS).causes
    assert changes(STATS, replace(SETTINGS, cpus=16.0))[0] == {"num_workers": 10}


def test_threads_that_keep_one_processor_busy_between_them_are_told_to_be_processes() -> None:
    locked = replace(STATS, cpu_seconds=0.04)  # the other half is waiting for the other thread
    threads = replace(SETTINGS, worker_type="thread", cpus=16.0)
    assert changes(locked, threads)[0] == {"worker_type": "process", "num_workers": 5}


def test_more_samples_are_not_advised_where_they_cost_as_much_as_volumes() -> None:
    by_patch = replace(SETTINGS, after_sampling=("LoadImaged", "RandRotated"))
    assert not changes(STATS, by_patch)
    assert changes(STATS, SETTINGS)


def test_more_samples_are_not_advised_where_their_number_is_the_volumes_own() -> None:
    assert all("samples_per_volume" not in each for each in changes(STATS, replace(SETTINGS, fixed_samples=True)))


def test_a_longer_queue_keeps_as_many_volumes_mixed_as_memory_allows() -> None:
    stats = replace(STATS, step_seconds=0.025, wait_seconds=0.015)
    free = changes(stats, replace(SETTINGS, cpus=2.4))
    assert {"samples_per_volume": 8, "queue_length": 128} in free
    tight = changes(stats, replace(SETTINGS, cpus=2.4, memory=100 * 2**20))
    assert {"samples_per_volume": 8, "queue_length": 64} in tight
    short = changes(stats, replace(SETTINGS, cpus=2.4, memory=40 * 2**20, queue_length=8))
    assert not any("samples_per_volume" in each for each in short)


def test_a_few_batches_say_nothing_yet() -> None:
    diagnosis = diagnose(replace(STATS, batches=3), SETTINGS)
    assert "too early" in str(diagnosis)
    assert not diagnosis.advice


def test_the_store_spares_what_comes_before_everything_random() -> None:
    spent = {"LoadImaged": 0.04, "Spacingd": 0.03, "RandFlipd": 0.01}
    slow = replace(STATS, step_seconds=0.011, transform_seconds=spent)
    stored = replace(SETTINGS, storable=("LoadImaged", "Spacingd"))
    assert "ChunkedDataset" in str(diagnose(slow, stored))
    assert "ChunkedDataset" not in str(diagnose(slow, replace(stored, storable=("LoadImaged",))))


def test_a_loaders_settings_say_what_could_be_stored_and_what_is_done_to_patches() -> None:
    pipeline = Compose([EnsureTyped("image"), Identityd("image"), RandFlip(), RandUniformPatchd("image", 4, 3), abs])
    with PatchQueueLoader(Dataset([{"image": 0}] * 5, pipeline), batch_size=2, batch_unit="patch", repeats=2) as loader:
        settings = loader.settings()
    assert settings.storable == ("EnsureTyped", "Identityd")
    assert settings.after_sampling == ("abs",)
    assert (settings.samples_per_volume, settings.volumes, settings.batch_size, settings.repeats) == (3, 5, 2, 2)
    assert not settings.fixed_samples
