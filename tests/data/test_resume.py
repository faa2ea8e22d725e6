# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import multiprocessing
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from monai.handlers import CheckpointLoader, CheckpointSaver
from torch.utils.data import RandomSampler, WeightedRandomSampler

from monai_patchqueue import PatchQueueDataset, PatchQueueLoader
from tests.data.train_and_die import main
from tests.pipelines import Patches, add_one, digest, lines, make_loader

COUNTS = [5, 1, 3, 7, 0, 2]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """A state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def run(loader: PatchQueueLoader, batches: int) -> list[str]:
    """Digests of the next batches, epoch after epoch."""
    digests: list[str] = []
    while len(digests) < batches:
        for batch in loader:
            digests.append(digest([batch]))
            if len(digests) == batches:
                break
    return digests


@pytest.mark.parametrize("trial", range(16))
def test_a_resumed_run_gives_the_batches_of_the_unbroken_run(trial: int) -> None:
    choose = random.Random(trial)
    arguments: dict[str, Any] = {
        "batch_size": choose.choice([1, 3, 4]),
        "queue_length": choose.choice([None, 1, 4, 20]),
        "repeats": choose.choice([1, 2]),
        "drop_last": choose.random() < 0.5,
        "item_transform": choose.choice([None, add_one]),
        "seed": choose.choice([None, 5]),
    }
    if choose.random() < 0.4:
        arguments["sampler"] = WeightedRandomSampler([1.0, 2, 3, 4, 5, 6], 7)
    else:
        arguments["shuffle"] = choose.random() < 0.7
    torch.manual_seed(trial)
    unbroken = make_loader(COUNTS, **arguments)
    total = 3 * len(unbroken)
    expected = run(unbroken, total)
    stop = choose.randrange(total)

    with make_loader(COUNTS, 2, worker_type="thread", **arguments) as broken:
        assert run(broken, stop) == expected[:stop]
        state = through_a_file(broken.state_dict())
    assert (state["epoch"], state["batches"]) == divmod(stop, len(unbroken))
    torch.manual_seed(trial + 1)  # a new process: nothing but the state says what the seed was
    with make_loader(COUNTS, choose.choice([0, 1, 3]), **arguments) as resumed:
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert run(resumed, total - stop) == expected[stop:]


def test_a_samplers_own_generator_goes_on_where_it_was() -> None:
    def loader() -> PatchQueueLoader:
        dataset = Patches(COUNTS)
        return make_loader(dataset, sampler=RandomSampler(dataset, generator=torch.Generator().manual_seed(4)))

    total = 3 * len(loader())
    expected = run(loader(), total)
    for stop in (0, 5, total // 3, total // 3 + 2):
        broken, resumed = loader(), loader()
        run(broken, stop)
        resumed.load_state_dict(through_a_file(broken.state_dict()))
        assert run(resumed, total - stop) == expected[stop:], stop


@pytest.mark.parametrize("stop", [0, 1, 6, 8])
def test_only_volumes_with_unused_patches_are_read_again(tmp_path: Path, stop: int) -> None:
    arguments = {"batch_size": 2, "queue_length": 4, "shuffle": True, "persistent_workers": False}
    seen = []
    with make_loader(COUNTS, **arguments) as broken:
        epoch = iter(broken)
        for _ in range(stop):
            seen.append(next(epoch))
        state = broken.state_dict()
        rest = {volume for batch in epoch for volume in batch["volume"].tolist()}
    log = tmp_path / "loads"
    with make_loader(Patches(COUNTS, log), samples_per_volume="count", **arguments) as resumed:
        resumed.load_state_dict(state)
        list(resumed)
    loaded = [int(line) for line in lines(log)]
    assert sorted(loaded) == sorted(rest)


def test_the_state_names_the_last_batch_handed_out_not_those_assembled_ahead() -> None:
    with make_loader(COUNTS, 2, worker_type="thread", batch_size=6) as loader:
        assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (0, 0)
        epoch = iter(loader)
        for batches in (1, 2):
            next(epoch)
            assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (0, batches)
        next(epoch)
        assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (1, 0)
        assert next(epoch, None) is None
        assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (1, 0)


def test_the_state_takes_a_few_bytes_per_volume() -> None:
    loader = make_loader([8] * 2000, shuffle=True, queue_length=512)
    next(iter(loader))
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    assert len(file.getvalue()) < 2000 * 8 + 2000


def test_volumes_that_were_replaced_are_not_tried_again(tmp_path: Path) -> None:
    def fault(volume: int) -> None:
        if volume in (0, 3):
            raise OSError("the file ends early")

    arguments = {
        "batch_size": 2,
        "queue_length": 4,
        "shuffle": True,
        "on_error": "replace",
        "persistent_workers": False,
    }
    unbroken = make_loader(Patches(COUNTS, fault=fault), **arguments)
    expected = run(unbroken, len(unbroken))
    broken = make_loader(Patches(COUNTS, fault=fault), **arguments)
    assert run(broken, 7) == expected[:7]
    log = tmp_path / "loads"
    resumed = make_loader(Patches(COUNTS, log, fault), **arguments)
    resumed.load_state_dict(through_a_file(broken.state_dict()))
    assert [digest([batch]) for batch in resumed] == expected[7:]
    assert broken.state_dict()["replaced"]
    assert not {"0", "3"} & set(lines(log))


def test_samplers_that_nobody_knows_have_their_order_in_the_state() -> None:
    class Own:
        def __iter__(self) -> Iterator[int]:
            return iter([3, 0, 1])

        def __len__(self) -> int:
            return 3

    loader = make_loader(COUNTS, sampler=Own())
    assert loader.state_dict()["order"] == []
    next(iter(loader))
    assert loader.state_dict()["order"] == [3, 0, 1]
    other = {**loader.state_dict(), "rank": 1}
    with pytest.raises(ValueError, match="rank 1"):
        loader.load_state_dict(other)


@pytest.mark.parametrize(
    ("argument", "here", "there"),
    [("batch_size", 2, 3), ("seed", 1, 2), ("queue_length", 4, 5), ("repeats", 1, 2), ("drop_last", True, False)],
)
def test_a_state_of_other_arguments_is_refused(argument: str, here: Any, there: Any) -> None:
    one, other = make_loader(COUNTS, **{argument: here}), make_loader(COUNTS, **{argument: there})
    next(iter(one))
    with pytest.raises(ValueError, match=argument):
        other.load_state_dict(one.state_dict())


def test_something_else_is_refused_as_a_state() -> None:
    with pytest.raises(ValueError, match="not the state of a patch queue"):
        make_loader(COUNTS).load_state_dict({"epoch": 3})
    with pytest.raises(ValueError, match="version 99"):
        make_loader(COUNTS).load_state_dict({"version": 99})


def test_at_an_epochs_start_the_queue_may_have_another_length() -> None:
    one, other = make_loader(COUNTS, queue_length=4), make_loader(COUNTS, queue_length=5)
    list(one)
    other.load_state_dict(one.state_dict())
    assert len(list(other)) == len(other)


def test_naming_the_epoch_that_is_resumed_changes_nothing() -> None:
    unbroken, resumed = make_loader(COUNTS, shuffle=True), make_loader(COUNTS, shuffle=True)
    expected = run(unbroken, len(unbroken))
    next(iter(unbroken))
    unbroken.set_epoch(0)
    first = iter(unbroken)
    next(first)
    resumed.load_state_dict(unbroken.state_dict())
    resumed.set_epoch(0)
    assert [digest([batch]) for batch in resumed] == expected[1:]


def test_loading_a_state_ends_older_iterators() -> None:
    loader = make_loader(COUNTS)
    epoch = iter(loader)
    next(epoch)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(RuntimeError, match="newer iterator"):
        next(epoch)


def test_the_dataset_resumes_at_a_patch() -> None:
    def patches() -> PatchQueueDataset:
        return PatchQueueDataset(Patches(COUNTS), samples_per_volume="count", queue_length=4, seed=0)

    expected = [digest([patch]) for patch in patches()]
    broken, resumed = patches(), patches()
    for _ in zip(range(5), broken, strict=False):
        pass
    resumed.load_state_dict(through_a_file(broken.state_dict()))
    assert [digest([patch]) for patch in resumed] == expected[5:]


@pytest.mark.parametrize("every", [1, 3])
def test_a_checkpoint_counts_the_batches_that_the_engine_has_processed(tmp_path: Path, every: int) -> None:
    loader = make_loader(COUNTS, 2, worker_type="thread", batch_size=2, queue_length=6)
    seen: list[str] = []
    trainer = Engine(lambda _, batch: seen.append(digest([batch])))
    saver = CheckpointSaver(
        str(tmp_path), {"loader": loader, "trainer": trainer}, save_interval=every, epoch_level=False
    )
    saver.attach(trainer)
    trainer.run(loader, max_epochs=2)
    loader.close()
    for file in tmp_path.glob("*.pt"):
        resumed, engine = make_loader(COUNTS, batch_size=2, queue_length=6), Engine(lambda *_: None)
        CheckpointLoader(str(file), {"loader": resumed, "trainer": engine}).attach(engine)
        engine.fire_event(Events.STARTED)
        done = engine.state.iteration
        assert run(resumed, len(seen) - done) == seen[done:]


def test_ignites_own_checkpoint_takes_the_loader(tmp_path: Path) -> None:
    loader = make_loader(COUNTS, batch_size=2)
    trainer = Engine(lambda *_: None)
    checkpoint = Checkpoint({"loader": loader}, str(tmp_path), global_step_transform=lambda e, _: e.state.iteration)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), checkpoint)
    trainer.run(loader, max_epochs=1)
    (file,) = tmp_path.glob("*.pt")
    resumed = make_loader(COUNTS, batch_size=2)
    Checkpoint.load_objects({"loader": resumed}, torch.load(file, weights_only=True))
    assert resumed.state_dict()["batches"] == 3


@pytest.mark.parametrize("epoch_length", [None, 4, 13])
def test_a_killed_training_goes_on_with_the_losses_of_an_unbroken_one(tmp_path: Path, epoch_length: int | None) -> None:
    def train(folder: Path, kill_at: int) -> int | None:
        # Forked, as starting Python and importing torch would take most of the test's time.
        process = multiprocessing.get_context("fork").Process(target=main, args=(folder, epoch_length or 0, kill_at))
        process.start()
        process.join(120)
        return process.exitcode

    assert train(tmp_path / "whole", kill_at=0) == 0
    for kill_at in (5, 11, 0):
        assert train(tmp_path / "broken", kill_at) == (-signal.SIGKILL if kill_at else 0)
    losses = [lines(tmp_path / name / "losses") for name in ("whole", "broken")]
    assert len(losses[0]) >= 20
    assert losses[0] == losses[1]
