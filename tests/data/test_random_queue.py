# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import pickle
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, MetaTensor
from monai.transforms import Randomizable, RandSpatialCropSamplesd, Transform

from monai_patchqueue import PriorityHandler, RandomQueueDataset, diagnose
from monai_patchqueue.data import random_session
from tests.pipelines import append_line, lines, make_loader
from tests.processes import die, wait_for, workers

# How items are prepared must not matter.
KINDS = {
    "inline": {"num_workers": 0},
    "1 process": {"num_workers": 1},
    "2 processes": {"num_workers": 2},
    "2 threads": {"num_workers": 2, "worker_type": "thread"},
}
WORKERS = {name: KINDS[name] for name in ("2 processes", "2 threads")}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
with_workers = pytest.mark.parametrize("kind", WORKERS.values(), ids=WORKERS)


def volumes(number: int, side: int = 12) -> list[dict[str, Any]]:
    return [{"image": torch.full((1, side, side, side), float(i)), "number": i} for i in range(number)]


def ragged(number: int) -> list[dict[str, Any]]:
    return [{"image": torch.full((1, 12, 12, 12 + i % 3), float(i)), "number": i} for i in range(number)]


def numbers(batches: Iterable[dict[str, Any]]) -> list[tuple[int, ...]]:
    """The items of each batch, having seen that the images are theirs."""
    drawn = []
    for batch in batches:
        drawn.append(tuple(batch["number"].tolist()))
        for image, number in zip(batch["image"], drawn[-1], strict=True):
            assert bool((image == number).all()), (number, image.unique())
    return drawn


@pytest.fixture
def make() -> Iterator[Callable[..., RandomQueueDataset]]:
    made = []

    def make_queue(data: Any, *args: Any, **arguments: Any) -> RandomQueueDataset:
        defaults = {"batch_size": 3, "queue_length": 8, "epoch_length": 30, "seed": 4}
        made.append(RandomQueueDataset(data, *args, **{**defaults, **arguments}))
        return made[-1]

    yield make_queue
    for queue in made:
        queue.close()


class Faulty(Transform):
    """Does something to one item."""

    def __init__(self, number: int, fault: Callable[[], object], log: Path | None = None) -> None:
        self.number = number
        self.fault = fault
        self.log = log

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["number"] == self.number and (self.log is None or not lines(self.log)):
            if self.log is not None:
                append_line(self.log, "tried")
            self.fault()
        return item


def broken() -> None:
    raise OSError("the disk says no")


class Slow(Transform):
    """Takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, item: Any) -> Any:
        time.sleep(self.seconds)
        return item


@pytest.mark.parametrize("data", [volumes(20), ragged(20)], ids=["equal", "ragged"])
@pytest.mark.filterwarnings("ignore:tensors of different shapes")
def test_the_same_seed_gives_the_same_batches_whoever_prepares_them(data: list[Any], make: Any) -> None:
    drawn = {name: numbers(make(data, **kind)) for name, kind in KINDS.items()}
    assert len(set(map(tuple, drawn.values()))) == 1
    assert numbers(make(data, **KINDS["inline"], seed=5)) != drawn["inline"]


def test_a_batch_has_no_item_twice_and_an_epoch_its_length(make: Any) -> None:
    queue = make(volumes(20), num_workers=0)
    for _ in range(2):
        drawn = numbers(queue)
        assert len(drawn) == len(queue) == 30
        assert all(len(set(batch)) == 3 for batch in drawn)
    assert queue.stats().patches == 180


def test_epochs_go_on_where_the_last_one_stopped(make: Any) -> None:
    queue, unbroken = make(volumes(20), num_workers=2), make(volumes(20), num_workers=0, epoch_length=75)
    drawn = numbers(queue) + numbers(islice(iter(queue), 15)) + numbers(queue)
    assert drawn == numbers(unbroken)


def test_batch_generator_has_no_end(make: Any) -> None:
    assert numbers(islice(make(volumes(20), num_workers=0).batch_generator(), 75)) == numbers(
        make(volumes(20), num_workers=0, epoch_length=75)
    )


@every_kind
def test_transforms_that_change_items_in_place_do_not_change_the_queue(kind: dict[str, Any], make: Any) -> None:
    data = volumes(6)

    def spoil(item: dict[str, Any]) -> dict[str, Any]:
        assert bool((item["image"] == item["number"]).all())
        item["image"].mul_(0).sub_(1)
        item["nested"]["list"].append(1)
        assert item["nested"]["list"] == [1]
        return item

    for record in data:
        record["nested"] = {"list": []}
    queue = make(data, item_transform=spoil, queue_length=5, **kind)
    for batch in queue:
        assert bool((batch["image"] == -1).all())
    assert all(bool((record["image"] == record["number"]).all()) for record in data)


@pytest.mark.filterwarnings("ignore:tensors of different shapes")
def test_batches_that_the_consumer_changes_do_not_change_items_of_different_shapes(make: Any) -> None:
    for batch in make(ragged(9), num_workers=0):
        for image, number in zip(batch["image"], batch["number"], strict=True):
            assert bool((image == number).all())
            image.fill_(-1)


def test_items_of_different_shapes_become_lists_with_one_warning(make: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = list(make(ragged(20), num_workers=2))
    assert any(isinstance(batch["image"], list) for batch in batches)
    assert len([w for w in caught if "cannot be stacked" in str(w.message)]) == 1
    assert "'image'" in str(caught[0].message)
    assert "(1, 12, 12, 1" in str(caught[0].message)


@with_workers
def test_metadata_of_items_of_any_shape_comes_through(kind: dict[str, Any], make: Any) -> None:
    data = ragged(6)
    for record in data:
        affine = torch.diag(torch.tensor([1.0, 2.0, 3.0 + record["number"], 1.0], dtype=torch.float64))
        record["image"] = MetaTensor(record["image"], affine=affine, meta={"name": f"case {record['number']}"})
    queue = make(data, batch_size=1, queue_length=4, **kind)
    for batch in queue:
        number = batch["number"].item()
        assert batch["image"].affine[0, 2, 2] == 3 + number
        assert batch["image"].meta["name"] == [f"case {number}"] or batch["image"].meta["name"] == f"case {number}"


def test_patches_of_volumes_are_items(make: Any) -> None:
    crop = RandSpatialCropSamplesd("image", roi_size=6, num_samples=3, random_size=False)
    queue = make(volumes(5), crop, queue_length=12, num_workers=0)
    drawn = Counter(number for batch in numbers(queue) for number in batch)
    assert set(drawn) == set(range(5))
    assert queue.stats().volume_counts == drawn


class Noise(Randomizable, Transform):
    """Adds random numbers, one of them from a global generator, as many a transform does."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        return {**item, "drawn": float(self.R.random()), "of_torch": torch.rand(()).item()}


def test_no_two_items_have_the_same_randomness_though_workers_are_copies(make: Any) -> None:
    queue = make(volumes(40), Noise(), num_workers=2, queue_length=4, batch_size=2, samples_per_insert=1)
    seen: dict[float, int] = {}
    for batch in queue:
        for key in ("drawn", "of_torch"):
            for drawn, number in zip(batch[key].tolist(), batch["number"].tolist(), strict=True):
                assert seen.setdefault(drawn, number) == number
    assert len(seen) > 60


def test_every_draw_of_an_item_is_transformed_anew(make: Any) -> None:
    queue = make(volumes(4), item_transform=Noise(), num_workers=0, queue_length=4)
    drawn = [value for batch in queue for value in batch["drawn"].tolist()]
    assert len(set(drawn)) == len(drawn) == 90


@with_workers
def test_wait_fill_waits_for_a_full_queue(kind: dict[str, Any], make: Any) -> None:
    queue = make(volumes(20), Slow(0.02), queue_length=10, **kind)
    assert queue.qsize == 0
    next(iter(queue))
    assert queue.stats().volumes >= 10 == queue.stats().queue_length


def test_wait_fill_waits_for_as_many_items_as_it_says(make: Any) -> None:
    queue = make(volumes(20), queue_length=10, num_workers=0, wait_fill=6)
    first = numbers(islice(iter(queue), 40))
    assert len(set(first[0])) == 3
    later = make(volumes(20), queue_length=10, num_workers=1)
    assert later.wait_fill_queue(7) >= 7
    assert later.wait_fill_queue() == 10


def test_without_waiting_the_queue_grows_by_an_item_a_batch(make: Any) -> None:
    queue = make(volumes(20), queue_length=10, num_workers=0, wait_fill=False)
    seen: set[int] = set()
    batches = iter(queue)
    for count in range(7):
        seen |= set(*numbers([next(batches)]))
        assert len(seen) <= 3 + count
        assert queue.qsize <= 4 + count


def test_a_timeout_of_the_filling_says_how_far_it_got_and_why_and_goes_on(make: Any) -> None:
    queue = make(volumes(20), Slow(0.15), num_workers=1, queue_length=15, wait_fill_timeout=1.2, batch_size=1)
    with pytest.warns(
        UserWarning, match=r"\d of 15 items .* after 1.2 s: 1 worker took 0\.\d+ s for each of \d volumes"
    ):
        batch = next(iter(queue))
    assert batch["number"].item() < 20


def test_a_timeout_with_less_than_a_batch_is_an_error(make: Any) -> None:
    queue = make(volumes(20), Slow(2), num_workers=1, wait_fill_timeout=0.3)
    with pytest.raises(RuntimeError, match=r"0 of 8 items .* no volume was prepared .* A batch needs 3"):
        next(iter(queue))
    with pytest.raises(RuntimeError, match="0 of 8"):
        queue.wait_fill_queue(timeout=0.1)


@every_kind
def test_an_items_error_reaches_the_consumer_with_its_name(kind: dict[str, Any], make: Any) -> None:
    queue = make(volumes(6), Faulty(4, broken), queue_length=6, **kind)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(?s)volume 4.*the disk says no"):
            list(queue)


@with_workers
def test_after_an_error_it_goes_on_as_if_there_had_been_none(kind: dict[str, Any], make: Any, tmp_path: Path) -> None:
    queue = make(volumes(12), Faulty(4, broken, tmp_path / "log"), **kind)
    with pytest.raises(RuntimeError, match="the disk says no"):
        list(queue)
    drawn = queue.stats().patches // 3
    rest = numbers(islice(queue.batch_generator(), 40))
    expected = numbers(make(volumes(12), num_workers=0, epoch_length=40 + drawn))
    assert rest == expected[drawn:]


@every_kind
def test_items_that_fail_are_replaced_where_that_is_asked_for(kind: dict[str, Any], make: Any) -> None:
    queue = make(volumes(8), Faulty(4, broken), on_error="replace", **kind)
    drawn = Counter(number for batch in numbers(queue) for number in batch)
    assert set(drawn) == {0, 1, 2, 3, 5, 6, 7}
    assert queue.stats().failures > 0


@pytest.mark.parametrize("mode", ["onsample", "always"])
def test_a_worker_that_dies_over_and_over_is_an_error_and_no_stale_data(mode: str, make: Any) -> None:
    queue = make(volumes(8), Faulty(4, die), mode=mode, num_workers=2, epoch_length=10_000)
    with pytest.raises(RuntimeError, match=r"volume 4.*SIGKILL"):
        list(queue)


def test_a_worker_that_dies_once_is_replaced(make: Any, tmp_path: Path) -> None:
    queue = make(volumes(8), Faulty(4, die, tmp_path / "log"), num_workers=2)
    assert numbers(queue) == numbers(make(volumes(8), num_workers=0))


def test_always_loads_while_nobody_draws_and_draws_what_is_there(make: Any) -> None:
    queue = make(volumes(30), mode="always", num_workers=2)
    batches = iter(queue)
    next(batches)
    wait_for(lambda: queue.stats().volumes > 60, "items go on entering")
    drawn = numbers(batches)
    assert len(drawn) == 29
    assert all(len(set(batch)) == 3 for batch in drawn)


def test_always_reuses_items_while_loading_is_slow(make: Any) -> None:
    queue = make(volumes(30), Slow(0.3), mode="always", num_workers=1, wait_fill=4, epoch_length=200)
    begin = time.monotonic()
    assert len(numbers(queue)) == 200
    assert queue.stats().volumes < 5 + (time.monotonic() - begin) / 0.3


def test_samples_per_insert_limits_reuse(make: Any) -> None:
    queue = make(volumes(30), Slow(0.02), mode="always", num_workers=2, samples_per_insert=4, wait_fill=False)
    batches = iter(queue)
    for _ in range(30):
        next(batches)
        stats = queue.stats()
        assert stats.patches <= 4 * stats.volumes


@pytest.mark.parametrize("mode", ["onsample", "always"])
def test_max_times_sampled_holds(mode: str, make: Any) -> None:
    # Every record is a new item, by what its transform draws.
    queue = make(volumes(30), Noise(), mode=mode, num_workers=1, max_times_sampled=2, epoch_length=100)
    drawn = Counter(value for batch in queue for value in batch["drawn"].tolist())
    assert max(drawn.values()) == 2


def test_priorities_come_from_the_loss_through_the_handler(make: Any) -> None:
    queue = make(
        volumes(20), num_workers=2, queue_length=20, samples_per_insert=1e9, priority_exponent=1.0, epoch_length=400
    )
    trainer = Engine(lambda engine, batch: {"loss": 1.0 + 9.0 * (batch["number"] == 7)})
    seen = []

    def check(batch: dict[str, torch.Tensor]) -> None:
        seen.append(batch["number"].tolist())
        assert batch["item_id"].dtype == torch.int64
        assert batch["importance_weight"].dtype == torch.float32
        assert bool(((batch["importance_weight"] > 0) & (batch["importance_weight"] <= 1)).all())

    PriorityHandler(queue).attach(trainer)
    trainer.add_event_handler("ITERATION_COMPLETED", lambda engine: check(engine.state.batch))
    trainer.run(queue)
    later = Counter(number for batch in seen[100:] for number in batch)
    # In a batch of three without replacement, of items with priorities 10 and nineteen times 1:
    expected = 1 - 19 / 29 * 18 / 28 * 17 / 27
    assert abs(later[7] / 300 - expected) < 4 * np.sqrt(expected * (1 - expected) / 300)
    others = [count for number, count in later.items() if number != 7]
    assert len(others) == 19


def test_prioritized_batches_are_reproducible(make: Any) -> None:
    def run(**kind: Any) -> list[tuple[int, ...]]:
        queue = make(volumes(20), priority_exponent=0.8, **kind)
        drawn = []
        for batch in queue:
            drawn += numbers([batch])
            queue.update_priorities(batch["item_id"], 1.0 + batch["number"] % 5)
        return drawn

    assert run(num_workers=0) == run(num_workers=2) == run(num_workers=2, worker_type="thread")


def test_priorities_need_to_be_asked_for_and_to_make_sense(make: Any) -> None:
    with pytest.raises(RuntimeError, match="priority_exponent"):
        make(volumes(5), queue_length=5, num_workers=0).update_priorities([0], [1.0])
    queue = make(volumes(5), queue_length=5, num_workers=0, priority_exponent=1.0)
    with pytest.raises(ValueError, match=r"found -1\.0"):
        queue.update_priorities([0, 1], [1.0, -1.0])
    with pytest.raises(ValueError, match="found nan"):
        queue.update_priorities([0], [float("nan")])
    with pytest.raises(ValueError, match="2 ids and 1 priorities"):
        queue.update_priorities([0, 1], [1.0])
    with pytest.raises(TypeError, match=r"item_id.*need a dictionary"):
        next(iter(make(volumes(5), queue_length=5, num_workers=0, priority_exponent=1.0, collate_fn=tuple)))


POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "filling": {"wait_fill": False},
    "reuse": {"max_times_sampled": 2, "min_size_to_sample": 5, "samples_per_insert": 2.5},
    "priorities": {"priority_exponent": 0.9},
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("stop", [0, 1, 13, 30, 47])
def test_a_run_goes_on_from_a_checkpoint(policy: dict[str, Any], stop: int, make: Any, tmp_path: Path) -> None:
    def steps(queue: RandomQueueDataset, number: int) -> list[Any]:
        drawn = []
        for batch in islice(queue.batch_generator(), number):
            drawn.append((numbers([batch]), batch["drawn"].tolist(), batch["noise"]))
            if "priority_exponent" in policy:
                queue.update_priorities(batch["item_id"], 1.0 + batch["number"] % 5)
        return drawn

    arguments = {**policy, "item_transform": Noise(), "batch_transform": BatchNoise()}
    first = make(volumes(20), num_workers=2, **arguments)
    expected = steps(make(volumes(20), num_workers=0, **arguments), stop + 20)
    assert steps(first, stop) == expected[:stop]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    first.close()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert json.loads(json.dumps(state)) == state
    resumed = make(volumes(20), num_workers=0, **arguments)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert steps(resumed, 20) == expected[stop:]


class BatchNoise(Randomizable):
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "noise": float(self.R.random())}


def test_a_resumed_epoch_has_the_batches_that_were_left(make: Any) -> None:
    queue = make(volumes(20), num_workers=0)
    numbers(islice(iter(queue), 12))
    resumed = make(volumes(20), num_workers=0)
    resumed.load_state_dict(queue.state_dict())
    assert len(numbers(resumed)) == 18
    assert len(numbers(resumed)) == 30


def test_states_of_other_queues_are_refused(make: Any) -> None:
    state = make(volumes(20), num_workers=0).state_dict()
    with pytest.raises(ValueError, match="batch_size=3, and this queue has 2"):
        make(volumes(20), num_workers=0, batch_size=2).load_state_dict(state)
    with pytest.raises(ValueError, match="items=20, and this queue has 19"):
        make(volumes(19), num_workers=0).load_state_dict(state)
    with pytest.raises(ValueError, match="not the state of a random queue"):
        make(volumes(20), num_workers=0).load_state_dict(make_loader([4, 4]).state_dict())
    with pytest.raises(ValueError, match="version 9"):
        make(volumes(20), num_workers=0).load_state_dict({**state, "version": 9})


def test_the_queue_is_as_long_as_memory_allows_and_the_data_is_useful(make: Any) -> None:
    nbytes = 12**3 * 4
    asked = {"queue_length": None, "num_workers": 0}

    def length(**arguments: Any) -> int:
        queue = make(volumes(20), **{**asked, **arguments})
        next(iter(queue))
        return queue.stats().queue_length

    assert length(ram_budget=5 * nbytes) == 5
    assert length(ram_budget=10 * nbytes, item_nbytes=2 * nbytes) == 5
    assert length(ram_budget=10 * nbytes, item_nbytes=torch.zeros(2, 12, 12, 12)) == 5
    assert length(ram_budget="1GiB") == 20
    assert length(ram_budget=0.5) == 20
    assert length(queue_length=1000) == 20
    with pytest.raises(ValueError, match="queue of 2 items, and a batch needs 3"):
        length(ram_budget=2 * nbytes)


def test_a_folder_of_files_is_data(make: Any, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / ".hidden.pt").write_bytes(b"not to be read")
    for item in volumes(9):
        folder = tmp_path / "more" if item["number"] % 2 else tmp_path
        torch.save(item, folder / f"{item['number']}.pt")
    assert {n for batch in numbers(make(tmp_path, num_workers=0)) for n in batch} == set(range(9))
    odd = make(str(tmp_path), num_workers=1, queue_length=4, filter_fn=lambda path: path.parent.name == "more")
    assert {n for batch in numbers(odd) for n in batch} == {1, 3, 5, 7}


def test_files_of_other_kinds_need_a_transform(make: Any, tmp_path: Path) -> None:
    for number in range(5):
        np.save(tmp_path / f"{number}.npy", np.full((1, 8, 8, 8), number, np.float32))
    with pytest.raises(ValueError, match=r"0\.npy is no \.pt file: pass a transform"):
        make(tmp_path)

    def load(item: dict[str, str]) -> dict[str, Any]:
        return {"image": np.load(item["image"]), "number": int(Path(item["image"]).stem)}

    queue = make(tmp_path, load, queue_length=4, num_workers=0)
    assert {n for batch in numbers(queue) for n in batch} == set(range(5))


def test_folders_and_records_that_give_nothing_are_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        make(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="0 files"):
        make(tmp_path)
    with pytest.raises(ValueError, match="leaves none of 4 records"):
        make(volumes(4), filter_fn=lambda record: False)
    (tmp_path / "list.pt").touch()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(RuntimeError, match=r"list\.pt holds a list"):
        next(iter(make(tmp_path, batch_size=1, queue_length=1, num_workers=0)))


def test_filter_fn_chooses_records(make: Any) -> None:
    queue = make(volumes(12), filter_fn=lambda record: record["number"] % 3 == 0, queue_length=4, num_workers=0)
    assert {n for batch in numbers(queue) for n in batch} == {0, 3, 6, 9}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "sometimes"}, "expected 'onsample' or 'always'"),
        ({"mode": "always", "num_workers": 0}, "needs num_workers >= 1"),
        ({"queue_length": 2}, "queue_length=2: a batch needs 3 items"),
        ({"min_size_to_sample": 9}, "queue_length=8: a batch needs 9 items"),
        ({"queue_length": None, "ram_budget": None}, "pass queue_length or ram_budget"),
        ({"batch_size": 21, "queue_length": 30}, "data gives 20 items to draw from, and a batch needs 21"),
        ({"samples_per_insert": 0}, "samples_per_insert=0"),
        ({"max_times_sampled": 0}, "max_times_sampled=0"),
        ({"priority_exponent": -1}, "priority_exponent=-1"),
        ({"item_nbytes": 0}, "item_nbytes=0"),
        ({"wait_fill": -1}, "wait_fill=-1"),
        ({"wait_fill_timeout": -1}, "wait_fill_timeout=-1"),
        ({"epoch_length": 0}, "epoch_length=0"),
        ({"executor": object(), "num_workers": 2}, "exclude each other"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make(volumes(20), **arguments)


def test_it_runs_in_a_dataloader_without_workers(make: Any) -> None:
    queue = make(volumes(20), num_workers=1)
    loader = queue.get_dataloader()
    assert len(loader) == 30
    assert len(numbers(loader)) == 30
    with pytest.raises(ValueError, match="num_workers=2 is the queue's to decide"):
        queue.get_dataloader(num_workers=2)
    with pytest.raises(RuntimeError, match="num_workers=0 to the DataLoader"):
        next(iter(DataLoader(queue, batch_size=None, num_workers=1)))


def test_an_older_iterator_ends_with_an_error(make: Any) -> None:
    queue = make(volumes(20), num_workers=0)
    older = iter(queue)
    next(older)
    next(iter(queue))
    with pytest.raises(RuntimeError, match="newer iterator"):
        next(older)


def test_a_copy_has_a_queue_of_its_own(make: Any) -> None:
    queue = make(volumes(20), num_workers=0)
    expected = numbers(queue)
    assert numbers(pickle.loads(pickle.dumps(queue))) == expected


def test_closing_ends_workers_and_iterating_again_goes_on(make: Any) -> None:
    before = set(workers())
    queue = make(volumes(20), num_workers=2)
    first = numbers(islice(iter(queue), 10))
    assert set(workers()) - before
    queue.close()
    wait_for(lambda: not set(workers()) - before, "workers have ended")
    expected = numbers(make(volumes(20), num_workers=0, epoch_length=40))
    assert first + numbers(queue) == expected


def test_ranks_draw_from_shares_of_the_data_and_one_checkpoint_serves_them_all(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_rank(rank: int, state: dict[str, Any] | None = None) -> tuple[RandomQueueDataset, list[tuple[int, ...]]]:
        monkeypatch.setattr(random_session, "ranks", lambda: (rank, 2))
        queue = make(volumes(20), num_workers=0, queue_length=4, samples_per_insert=6, epoch_length=10)
        if state is not None:
            queue.load_state_dict(state)
        return queue, numbers(islice(queue.batch_generator(), 10))

    (first, of_first), (second, of_second) = on_rank(0), on_rank(1)
    # Ten batches are five items that enter after the first four: less than the ten that each rank has of a pass.
    assert {n for batch in of_first for n in batch}.isdisjoint({n for batch in of_second for n in batch})
    of_rank_1 = second.state_dict()
    monkeypatch.setattr(random_session, "ranks", lambda: (0, 2))
    state = first.state_dict()
    assert {**of_rank_1, "rank": 0} == state
    assert on_rank(1, state)[1] == numbers(islice(second.batch_generator(), 10))


def test_states_that_hold_a_ranks_own_items_are_refused_on_others(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for rank in range(2):
        monkeypatch.setattr(random_session, "ranks", lambda rank=rank: (rank, 2))
        queue = make(volumes(20), num_workers=0, queue_length=4, max_times_sampled=2)
        if states:
            with pytest.raises(ValueError, match=r"taken on rank 0, and holds its items; this is rank 1"):
                queue.load_state_dict(states[0])
        next(iter(queue))
        states.append(queue.state_dict())


def test_no_file_descriptor_stays_per_item(make: Any) -> None:
    queue = make(ragged(20), num_workers=1, epoch_length=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = iter(queue)
        next(batches)
        before = len(os.listdir("/proc/self/fd"))
        numbers(batches)
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_workers_are_to_blame_only_where_batches_wait_for_them(make: Any) -> None:
    def causes(**arguments: Any) -> tuple[str, ...]:
        queue = make(volumes(20), Slow(0.02), num_workers=1, **arguments)
        for _ in queue:
            pass
        return tuple(diagnose(queue.stats(), queue.settings()).causes)

    assert any(cause.startswith("workers") for cause in causes(samples_per_insert=1))
    assert not any(cause.startswith("workers") for cause in causes(mode="always"))


def test_log_sampling_says_how_evenly_items_were_drawn(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    queue = make(volumes(20), num_workers=0, log_sampling=True)
    with caplog.at_level("INFO", "monai_patchqueue"):
        numbers(queue)
    counts = list(queue.stats().volume_counts.values())
    assert f"{min(counts)} to {max(counts)} times, 4.5 ± " in caplog.text
    assert "from each of 20 volumes" in caplog.text


def test_draws_are_even_over_the_data(make: Any) -> None:
    queue = make(volumes(40), num_workers=0, queue_length=10, batch_size=5, epoch_length=1600)
    drawn = Counter(number for batch in numbers(queue) for number in batch)
    counts = np.array([drawn[number] for number in range(40)])
    # 200 draws each, in 40 stays of 5 draws on average; each stay's are binomial, so this is above their true spread.
    assert abs(counts - 200).max() < 5 * np.sqrt(200)
    assert counts.std() < 1.3 * np.sqrt(200)
