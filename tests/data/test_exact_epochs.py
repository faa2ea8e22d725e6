# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import Dataset, DistributedWeightedRandomSampler
from torch.utils.data import DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from tests.pipelines import Patches, drawn, every_patch, lines, make_loader
from tests.processes import wait_for

COUNTS = [5, 1, 3, 7, 0, 2]
WORKERS = [
    pytest.param({"num_workers": 0}, id="inline"),
    pytest.param({"num_workers": 2, "worker_type": "thread"}, id="threads"),
    pytest.param({"num_workers": 2}, id="processes"),
]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("queue_length", [1, 3, 8, 1000])
def test_every_epoch_has_every_patch_once_at_any_queue_length(workers: dict[str, Any], queue_length: int) -> None:
    with make_loader(COUNTS, **workers, batch_size=4, shuffle=True, queue_length=queue_length) as loader:
        for _ in range(3):
            batches = list(loader)
            assert [len(batch["volume"]) for batch in batches] == [4, 4, 4, 4, 2]
            assert Counter(drawn(batches)) == every_patch(COUNTS)
            assert len(loader) == len(batches)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_repeats_draw_every_patch_that_often(workers: dict[str, Any], batch_size: int) -> None:
    arguments = {"batch_size": batch_size, "repeats": 3, "queue_length": 4, "shuffle": True}
    with make_loader(COUNTS, **workers, **arguments) as loader:
        assert len(loader) == -(-54 // batch_size)
        for _ in range(2):
            batches = list(loader)
            assert Counter(drawn(batches)) == every_patch(COUNTS, repeats=3)
            assert len(batches) == len(loader)


@pytest.mark.parametrize("workers", WORKERS)
def test_drop_last_leaves_out_only_the_tail(workers: dict[str, Any]) -> None:
    with make_loader(COUNTS, **workers, batch_size=4, shuffle=True, drop_last=True) as loader:
        assert len(loader) == 4
        for _ in range(3):
            draws = drawn(loader)
            assert len(draws) == 16
            assert set(Counter(draws).values()) == {1}


@pytest.mark.parametrize("workers", WORKERS)
def test_without_shuffling_patches_come_in_order(workers: dict[str, Any]) -> None:
    with make_loader(COUNTS, **workers, batch_size=4, queue_length=6) as loader:
        for _ in range(2):
            assert drawn(loader) == sorted(every_patch(COUNTS))


def test_shuffled_epochs_differ_and_mix_volumes() -> None:
    loader = make_loader([8] * 8, batch_size=8, shuffle=True)
    first, second = drawn(loader), drawn(loader)
    assert first != second
    volumes_per_batch = [len({volume for volume, _ in second[i : i + 8]}) for i in range(0, 64, 8)]
    assert np.mean(volumes_per_batch) > 4


@pytest.mark.parametrize(
    "samples", [pytest.param("count", id="key"), pytest.param(lambda r: r["count"], id="callable")]
)
def test_counts_by_key_and_by_callable_are_the_same(samples: Any) -> None:
    assert Counter(drawn(make_loader(COUNTS, samples_per_volume=samples, shuffle=True))) == every_patch(COUNTS)


@pytest.mark.parametrize("workers", WORKERS)
def test_an_epoch_after_an_early_break_starts_clean(workers: dict[str, Any]) -> None:
    with make_loader([4] * 8, **workers, batch_size=4, shuffle=True) as loader:
        for taken in (1, 3, 7):
            assert len(drawn(islice(iter(loader), taken))) == 4 * taken
            assert loader.stats().epoch % 2 == 0
            assert Counter(drawn(loader)) == every_patch([4] * 8)


@pytest.mark.parametrize("workers", WORKERS[1:])
def test_an_early_break_keeps_the_next_epochs_prepared_volumes(workers: dict[str, Any], tmp_path: Path) -> None:
    dataset = Patches([2] * 4, log=tmp_path / "loads")
    with make_loader(dataset, **workers, batch_size=2, shuffle=True) as loader:
        for epoch in range(4):
            iterator = iter(loader)
            drawn(islice(iterator, 3))  # of 4: all of the epoch's volumes, and some of the next one's, are prepared
            assert loader.stats().epoch == epoch
    # Nothing is prepared twice: 4 volumes in each of 4 epochs, and at most 4 of a fifth.
    assert 16 <= len(lines(tmp_path / "loads")) <= 20


def test_inline_prepares_nothing_ahead(tmp_path: Path) -> None:
    dataset = Patches([4] * 8, log=tmp_path / "loads")
    loader = make_loader(dataset, batch_size=4)
    assert len(loader) == 8
    assert "patches_per_epoch=32" in repr(loader)
    assert lines(tmp_path / "loads") == []
    iterator = iter(loader)
    next(iterator)
    assert len(lines(tmp_path / "loads")) == 1
    list(iterator)
    assert len(lines(tmp_path / "loads")) == 8


@pytest.mark.parametrize("workers", WORKERS)
def test_two_iterators_without_a_draw_are_of_the_same_epoch(workers: dict[str, Any]) -> None:
    with make_loader([4] * 8, **workers, batch_size=4, shuffle=True) as loader:
        expected = drawn(loader)
    with make_loader([4] * 8, **workers, batch_size=4, shuffle=True) as loader:
        for _ in range(3):
            iterator = iter(loader)
        assert drawn(iterator) == expected
        assert loader.stats().epoch == 0


@pytest.mark.parametrize("workers", WORKERS)
def test_a_new_iterator_makes_an_older_one_raise(workers: dict[str, Any]) -> None:
    with make_loader([4] * 4, **workers, batch_size=4, shuffle=True) as loader:
        old = iter(loader)
        next(old)
        new = iter(loader)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="newer iterator"):
                next(old)
        assert Counter(drawn(new)) == every_patch([4] * 4)


def test_an_exhausted_iterator_stays_exhausted() -> None:
    loader = make_loader([4] * 4, batch_size=4)
    iterator = iter(loader)
    assert len(list(iterator)) == 4
    assert list(iterator) == []
    list(loader)
    assert list(iterator) == []


def test_set_epoch_names_the_next_epoch() -> None:
    reference = make_loader([4] * 8, batch_size=4, shuffle=True)
    epochs = [drawn(reference) for _ in range(4)]
    loader = make_loader([4] * 8, batch_size=4, shuffle=True)
    for epoch in (2, 0, 3, 3):
        loader.set_epoch(epoch)
        draws = drawn(loader)
        assert loader.stats().epoch == epoch
        assert draws == epochs[epoch]
    loader.set_epoch(1)
    next(iter(loader))
    list(loader)
    assert loader.stats().epoch == 2


def test_set_epoch_in_the_middle_of_an_epoch_names_the_next_one() -> None:
    loader = make_loader([4] * 8, batch_size=4, shuffle=True)
    iterator = iter(loader)
    next(iterator)
    loader.set_epoch(5)
    next(iterator)
    list(loader)
    assert loader.stats().epoch == 5


# -- samplers


@pytest.mark.parametrize("workers", WORKERS)
def test_a_volume_that_a_sampler_repeats_gives_new_patches_each_time(workers: dict[str, Any]) -> None:
    order = [2, 0, 2, 2, 1]
    with make_loader([3, 2, 4], **workers, sampler=order, batch_size=4) as loader:
        batches = list(loader)
    assert Counter(volume for volume, _ in drawn(batches)) == {2: 12, 0: 3, 1: 2}
    noise = torch.cat([batch["noise"] for batch in batches])
    assert len(noise.unique()) == 17


def test_a_weighted_sampler_decides_how_often_a_volume_comes() -> None:
    sampler = WeightedRandomSampler([0.0, 1.0, 3.0], num_samples=40)
    loader = make_loader([2, 2, 2], sampler=sampler, batch_size=4)
    assert len(loader) == 20
    first, second = (list(loader) for _ in range(2))
    volumes = Counter(volume for volume, _ in drawn(first))
    assert volumes[0] == 0
    assert volumes.total() == 80
    assert volumes[1] < volumes[2]
    assert len(torch.cat([batch["noise"] for batch in first + second]).unique()) == 160


def test_a_subset_sampler_decides_which_volumes_come() -> None:
    loader = make_loader([2, 3, 4, 5], sampler=SubsetRandomSampler([3, 1]), batch_size=4)
    for _ in range(2):
        assert Counter(volume for volume, _ in drawn(loader)) == {3: 5, 1: 3}
    assert len(loader) == 2


def test_a_random_sampler_with_its_own_generator_decides_the_order() -> None:
    def order(seed: int, arguments: Any) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        loader = make_loader([1] * 30, batch_size=5, shuffle_patches=False, **arguments(generator))
        return [volume for _ in range(2) for volume, _ in drawn(loader)]

    def by_sampler(generator: torch.Generator) -> dict[str, Any]:
        return {"sampler": RandomSampler(range(30), generator=generator)}

    def by_argument(generator: torch.Generator) -> dict[str, Any]:
        return {"shuffle": True, "generator": generator}

    expected = RandomSampler(range(30), generator=torch.Generator().manual_seed(7))
    expected_order = [*expected, *expected]
    assert order(7, by_sampler) == expected_order
    assert order(7, by_argument) == expected_order
    assert order(8, by_argument) != expected_order


@pytest.mark.parametrize("workers", WORKERS[:2])
def test_a_distributed_sampler_shards_volumes_and_reshuffles_by_its_own_epoch(workers: dict[str, Any]) -> None:
    dataset = Patches([2] * 8)
    samplers = [DistributedSampler(dataset, 2, rank, seed=3) for rank in range(2)]
    loaders = [make_loader(dataset, **workers, sampler=sampler, batch_size=2) for sampler in samplers]
    orders = []
    for epoch in range(1, 4):
        for sampler in samplers:
            sampler.set_epoch(epoch)  # as MONAI's Workflow does before it asks for the iterator
        draws = [drawn(loader) for loader in loaders]
        assert Counter(draws[0] + draws[1]) == every_patch([2] * 8)
        orders.append(frozenset(volume for volume, _ in draws[0]))
    assert len(set(orders)) > 1
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("sampler_class", [DistributedSampler, "weighted"])
def test_every_rank_has_the_same_number_of_batches_with_variable_counts(sampler_class: Any) -> None:
    counts = [1, 9, 2, 8, 3, 7, 4]
    dataset = Patches(counts)
    lengths = set()
    for rank in range(3):
        if sampler_class == "weighted":
            sampler = DistributedWeightedRandomSampler(
                dataset, weights=[1.0] * 7, num_samples_per_rank=3, num_replicas=3, rank=rank
            )
        else:
            sampler = DistributedSampler(dataset, 3, rank)
        loader = make_loader(dataset, sampler=sampler, batch_size=4)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            batches = list(loader)
            drawn(batches)
            lengths |= {len(batches), len(loader)}
            assert sum(len(batch["volume"]) for batch in batches) == 12
    assert lengths == {3}


def test_draws_that_a_rank_loses_or_makes_again_are_counted() -> None:
    counts = [1, 9]
    dataset = Patches(counts)
    for rank, (lost, extra) in enumerate([(0, 4), (4, 0)]):
        sampler = DistributedSampler(dataset, 2, rank, shuffle=False)
        loader = make_loader(dataset, sampler=sampler, batch_size=5)
        for epoch in range(1, 3):
            list(loader)
            assert (loader.stats().lost_draws, loader.stats().extra_draws) == (lost * epoch, extra * epoch)


def test_more_ranks_than_volumes_are_refused() -> None:
    dataset = Patches([3, 3])
    with pytest.raises(ValueError, match="2 volumes for 4 ranks"):
        make_loader(dataset, sampler=DistributedSampler(dataset, 4, 0))


@pytest.mark.parametrize(("sampler", "message"), [([0, 7], "index 7"), ([0, -1], "index -1")])
def test_a_sampler_that_gives_impossible_volumes_is_named(sampler: list[int], message: str) -> None:
    class Odd:
        def __iter__(self) -> Any:
            return iter(sampler)

        def __len__(self) -> int:
            return 2

    with pytest.raises(ValueError, match=f"Odd gave {message}"):
        list(make_loader([2, 2], sampler=Odd()))


def test_single_patches_need_no_counts() -> None:
    volumes = [{"image": torch.full((1, 40, 40), float(i))} for i in range(5)]
    loader = make_loader(Dataset(volumes), batch_size=2, shuffle=True, batch_unit=None)
    values = torch.cat([batch["image"][:, 0, 0, 0] for batch in loader])
    assert sorted(values.tolist()) == [0, 1, 2, 3, 4]


def test_batch_unit_volume_keeps_monais_meaning() -> None:
    loader = make_loader([3] * 4, batch_size=2, batch_unit="volume")
    assert [len(batch["volume"]) for batch in loader] == [6, 6]
    with pytest.raises(ValueError, match="same number of patches"):
        make_loader([3, 4], batch_unit="volume")


def test_a_warning_names_both_meanings_of_batch_size_once() -> None:
    with pytest.warns(UserWarning, match=r"batch_size=2 .*2 in a batch.*3 × 2 patches") as caught:
        make_loader([3] * 4, batch_size=2, batch_unit=None)
    assert len(caught) == 1


@pytest.mark.parametrize("workers", WORKERS)
def test_workers_that_do_not_persist_give_exact_epochs_too(workers: dict[str, Any]) -> None:
    reference = make_loader(COUNTS, batch_size=4, shuffle=True)
    with make_loader(COUNTS, **workers, batch_size=4, shuffle=True, persistent_workers=False) as loader:
        for _ in range(2):
            assert drawn(loader) == drawn(reference)


def test_two_loaders_run_at_once() -> None:
    first = make_loader([4] * 6, 1, batch_size=4, shuffle=True)
    second = make_loader([4] * 6, 1, batch_size=4, shuffle=True, worker_type="thread")
    pairs = list(zip(first, second, strict=True))
    assert drawn(a for a, _ in pairs) == drawn(b for _, b in pairs)
    for loader in (first, second):
        loader.close()


@pytest.mark.parametrize("workers", WORKERS[1:])
def test_the_next_epochs_first_batch_is_assembled_before_it_is_asked_for(workers: dict[str, Any]) -> None:
    assembled: list[list[int]] = []

    def note(batch: Any) -> Any:
        assembled.append(batch["volume"].tolist())
        return batch

    arguments = {"batch_size": 4, "shuffle": True, "seed": 0, **workers}
    with make_loader(COUNTS, **arguments) as loader:
        expected = [batch["volume"].tolist() for _ in range(3) for batch in loader]
    with make_loader(COUNTS, **arguments, batch_transform=note) as loader:
        for epoch in range(3):
            iterator = iter(loader)
            batches = [batch["volume"].tolist() for batch in islice(iterator, len(loader))]
            assert batches == expected[epoch * len(loader) :][: len(loader)]
            # The consumer is still busy with the last batch, and has not heard that the epoch is over.
            wait_for(lambda e=epoch: len(assembled) > (e + 1) * len(loader), "the next epoch's first batch")  # type: ignore[misc]
            assert loader.state_dict()["epoch"] == epoch + 1
            assert next(iterator, None) is None
        assert len(assembled) == 3 * len(loader) + 1
        assert assembled[:-1] == expected


def test_an_error_in_the_next_epochs_first_batch_waits_until_it_is_asked_for() -> None:
    failing = 2
    started = 0

    def fail(batch: Any) -> Any:
        nonlocal failing, started
        started += 1
        if started > len(loader) and failing:
            failing -= 1
            raise OSError("the disk was away")
        return batch

    with make_loader(COUNTS, batch_size=4, num_workers=2, batch_transform=fail) as loader:
        first = iter(loader)
        assert len(drawn(islice(first, len(loader)))) == sum(COUNTS)
        wait_for(lambda: failing < 2, "the next epoch's first batch")
        assert next(first, None) is None
        with pytest.raises(OSError, match="the disk was away"):
            next(iter(loader))
        assert Counter(drawn(loader)) == every_patch(COUNTS)


def test_another_epoch_than_the_one_that_was_guessed_is_exact_too() -> None:
    arguments = {"batch_size": 4, "shuffle": True, "seed": 0, "num_workers": 2}
    with make_loader(COUNTS, **arguments) as loader:
        epochs = [drawn(loader) for _ in range(6)]
    with make_loader(COUNTS, **arguments) as loader:
        for epoch in (0, 3, 1, 5):
            loader.set_epoch(epoch)
            assert drawn(loader) == epochs[epoch]
            time.sleep(0.1)
