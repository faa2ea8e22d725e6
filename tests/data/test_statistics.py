# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
import time
from typing import Any

import pytest
import torch

from monai_patchqueue import RandomQueueDataset
from monai_patchqueue.queue.slab import SlabHandle
from tests.pipelines import Patches, SlowCounts, drawn, make_loader

COUNTS = [5, 1, 3, 7, 0, 2]
WORKERS = [
    pytest.param({"num_workers": 0}, id="inline"),
    pytest.param({"num_workers": 2, "worker_type": "thread"}, id="threads"),
    pytest.param({"num_workers": 2}, id="processes"),
]


@pytest.mark.parametrize("workers", WORKERS)
def test_figures_add_up(workers: dict[str, Any]) -> None:
    with make_loader(COUNTS, **workers, batch_size=4, shuffle=True, queue_length=6) as loader:
        stats = loader.stats()
        assert (stats.batches, stats.patches, stats.volumes, stats.queue_length, stats.slab_bytes) == (0, 0, 0, 0, 0)
        for epoch in range(2):
            list(loader)
            stats = loader.stats()
            assert stats.epoch == epoch
            assert stats.batches == 5 * (epoch + 1)
            assert stats.patches == 18 * (epoch + 1)
            expected = {volume: count * (epoch + 1) for volume, count in enumerate(COUNTS) if count}
            assert dict(stats.volume_counts) == expected
            assert stats.volumes >= 5 * (epoch + 1)
            assert stats.queue_length == 6
            assert 0 <= stats.fill <= 1
            assert 0 <= stats.starved <= 1
            assert 0 <= stats.last_wait_seconds <= stats.max_wait_seconds
            assert stats.wait_seconds <= stats.max_wait_seconds
            assert stats.failures == stats.lost_draws == stats.extra_draws == 0
        if not workers["num_workers"]:
            assert stats.volumes == 10
        figures = [float(figure) for figure in stats.scalars().values()]
        assert len(figures) == len(stats.scalars())
        assert "36 patches" in str(stats)


def slow(volume: int) -> None:
    time.sleep(0.05)


def test_a_consumer_that_waits_is_starved_and_one_that_is_slow_is_not() -> None:
    with make_loader(Patches([2] * 8, fault=slow), batch_size=2) as loader:
        list(loader)
        stats = loader.stats()
        assert stats.starved > 0.8
        assert stats.wait_seconds > 0.04
        assert stats.load_seconds > 0.04
        assert stats.write_seconds < 0.04
        assert stats.volumes_per_second < 21
    with make_loader([2] * 8, 1, worker_type="thread", batch_size=2) as loader:
        for _ in loader:
            time.sleep(0.05)
        assert loader.stats().starved < 0.5
        assert loader.stats().patches_per_second < 45


def test_the_first_waits_of_epochs_are_told_from_the_others() -> None:
    dataset = Patches([2] * 4, fault=slow)
    with make_loader(dataset, 1, worker_type="thread", batch_size=2, persistent_workers=False) as loader:
        list(loader)
        stats = loader.stats()
        assert 0.04 < stats.first_wait_seconds <= stats.max_wait_seconds
        assert stats.epoch_wait_seconds == 0
        list(loader)
        assert loader.stats().first_wait_seconds == stats.first_wait_seconds
        assert 0.04 < loader.stats().epoch_wait_seconds <= loader.stats().max_wait_seconds


@pytest.mark.parametrize(
    "workers", [*WORKERS, pytest.param({"executor": SlowCounts()}, id="executor that does not say how much it can do")]
)
def test_memory_is_known_beforehand_and_kept(workers: dict[str, Any]) -> None:
    with make_loader([4] * 10, **workers, batch_size=4, queue_length=8) as loader:
        promised = loader.memory_bytes()
        patch = 32 * 32 * 4
        list(loader)
        assert loader.memory_bytes() == promised
        stats = loader.stats()
        assert promised == stats.slab_bytes + 3 * 4 * patch
        assert stats.queue_length == 8


def test_a_budget_decides_the_length_and_is_kept() -> None:
    with make_loader([4] * 100, 2, worker_type="thread", batch_size=4, ram_budget="256KiB") as loader:
        next(iter(loader))
        stats = loader.stats()
        assert stats.queue_length == 2**18 // 4096
        assert stats.slab_bytes == (64 + 3 * 4 + 4) * 4096  # volumes in preparation, and a batch, come on top


def test_a_queue_that_does_not_fit_is_refused_with_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    from monai_patchqueue.data import sizing

    monkeypatch.setattr(sizing, "available_memory", lambda: 100 * 4096)
    with pytest.raises(ValueError, match=r"queue_length=90(.|\n)*slots for the queue(.|\n)*400.0 KiB available"):
        list(make_loader([4] * 100, queue_length=90, batch_size=4))
    with make_loader([4] * 100, batch_size=4) as loader:
        next(iter(loader))
        assert loader.stats().queue_length == 100 // 4  # a quarter


@pytest.mark.parametrize(
    ("counts", "batch_size", "expected"),
    [([4] * 3, 1, 12), ([4] * 100, 1, 64), ([1] * 100, 4, 32), ([2, 8] * 100, 4, 128)],
)
def test_the_default_length_follows_its_rule(counts: list[int], batch_size: int, expected: int) -> None:
    loader = make_loader(counts, batch_size=batch_size)
    next(iter(loader))
    assert loader.stats().queue_length == expected


def test_the_probed_volume_is_used_and_not_prepared_again(tmp_path: Any) -> None:
    dataset = Patches([4] * 3, log=tmp_path / "loads")
    with make_loader(dataset, batch_size=4, shuffle=True) as loader:
        loader.memory_bytes()
        loader.memory_bytes()
        assert len((tmp_path / "loads").read_text().split()) == 1
        draws = drawn(loader)
        assert len((tmp_path / "loads").read_text().split()) == 3
    with make_loader([4] * 3, batch_size=4, shuffle=True) as reference:
        assert draws == drawn(reference)


def test_a_slab_of_no_bytes_can_be_allocated() -> None:
    assert len(SlabHandle(shared=False).allocate(0)) == 1


def test_reuse_and_mixing_are_counted() -> None:
    with make_loader([4] * 3, batch_size=4, repeats=3, queue_length=1) as loader:
        assert loader.stats().reuse == 0
        list(loader)
        stats = loader.stats()
        assert stats.reuse == 3
        assert stats.volumes_per_batch == 1  # unshuffled: 12 draws of one volume after the other
    with make_loader([1] * 8, batch_size=4, shuffle=True) as loader:
        list(loader)
        assert loader.stats().reuse == 1
        assert loader.stats().volumes_per_batch == 4


def test_the_age_of_what_is_drawn_is_counted() -> None:
    items = [{"image": torch.zeros(1, 4)} for _ in range(8)]
    with RandomQueueDataset(items, num_workers=0, batch_size=4, queue_length=4, epoch_length=4) as queue:
        assert queue.stats().age == 0
        list(queue)  # all items there are in each batch, and one of them is new
        assert queue.stats().age == (0 + 0 + 0 + 0 + 1 + 1 + 1 + 0 + 2 + 2 + 1 + 0 + 3 + 2 + 1 + 0) / 16
    with make_loader([4] * 3, batch_size=4) as loader:
        list(loader)
        assert loader.stats().age == 0


def test_what_the_sampler_asked_for_is_known() -> None:
    counts = [4, 2, 2]
    sampler = [0, 1, 1, 0, 0]
    with make_loader(counts, batch_size=4, sampler=sampler, shuffle_patches=False) as loader:
        assert dict(loader.stats().volume_expected) == {}
        batches = iter(loader)
        next(batches)
        expected = loader.stats().volume_expected
        assert expected == pytest.approx({0: 4 * 12 / 16, 1: 4 * 4 / 16})  # a quarter of the epoch
        assert dict(loader.stats().volume_counts) == {0: 4}
        list(batches)
        for epoch in (1, 2):
            stats = loader.stats()
            assert dict(stats.volume_expected) == pytest.approx({0: 12 * epoch, 1: 4 * epoch})
            assert stats.volume_counts == stats.volume_expected
            list(loader)


def test_statistics_can_be_pickled_and_do_not_change_any_more() -> None:
    with make_loader([4, 2, 3], batch_size=3, shuffle=True) as loader:
        taken = []
        for _ in range(2):
            for _ in loader:
                stats = loader.stats()
                taken.append((stats, pickle.loads(pickle.dumps(stats)), loader.stats().volume_counts.array.tolist()))
    for stats, at_once, counts in taken:
        assert stats == at_once
        assert stats.volume_counts.array.tolist() == counts
        assert sum(stats.volume_counts.values()) == pytest.approx(sum(stats.volume_expected.values())) == stats.patches
        assert stats.volumes_seen == len(stats.volume_counts)
        assert stats.volume_patches_min == min(stats.volume_counts.values())
        assert stats.volume_patches_max == max(stats.volume_counts.values())
        with pytest.raises(ValueError, match="read-only"):
            stats.volume_counts.array[0] = 1
