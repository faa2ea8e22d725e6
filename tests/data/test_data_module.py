# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import logging
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ignite.engine import create_supervised_trainer
from monai.data import DataLoader
from monai.engines import SupervisedTrainer

from monai_patchqueue import PatchDataModule, PatchQueueLoader
from tests.numbered_volumes import Numbered, crop, make_module, numbers, records
from tests.pipelines import digest
from tests.processes import on_ranks
from tests.sampling.chi_square import p_value


@pytest.mark.parametrize(("train_loader", "kind"), [("queue", PatchQueueLoader), ("plain", DataLoader)])
def test_training_goes_through_the_queue_or_a_plain_loader(train_loader: Any, kind: type) -> None:
    module = make_module(6, train_loader=train_loader)
    loader = module.train_dataloader()
    assert type(loader) is kind
    first, second = numbers(loader), numbers(loader)
    assert Counter(first) == Counter(second) == dict.fromkeys(range(6), 4)
    assert first != second
    assert numbers(make_module(6, train_loader=train_loader).train_dataloader()) == first
    assert numbers(make_module(6, train_loader=train_loader, seed=1).train_dataloader()) != first


@pytest.mark.parametrize("train_loader", ["queue", "plain"])
def test_unshuffled_training_has_each_volume_once_in_order(train_loader: Any) -> None:
    module = make_module(5, train_loader=train_loader, drop_incomplete_batch=True, batch_size=4)
    assert numbers(module.unshuffled_train_dataloader()) == [number for number in range(5) for _ in range(4)]


def test_evaluation_has_whole_volumes_by_the_names_of_splits() -> None:
    module = make_module(3, others=("validation", "monitor-train", "monitor-other", "test"))
    assert list(module.val_dataloader()) == ["validation", "monitor-train", "monitor-other"]
    assert list(module.test_dataloader()) == list(module.predict_dataloader()) == ["test"]
    for loader in {**module.val_dataloader(), **module.test_dataloader()}.values():
        batches = list(loader)
        assert numbers(batches) == [100, 101, 102]
        assert batches[0]["image"].shape == (1, 1, 16, 16)
    assert make_module(3, others=()).val_dataloader() == {}
    with pytest.raises(ValueError, match=r"no split 'test'.*\['train'\]"):
        make_module(3, others=()).test_dataloader()


def test_evaluation_takes_a_batch_size_and_loader_arguments_of_its_own() -> None:
    module = make_module(3, eval_batch_size=2, eval_loader_arguments={"timeout": 0, "pin_memory": False})
    assert [len(batch["image"]) for batch in module.val_dataloader()["validation"]] == [2, 1]


@pytest.mark.parametrize(
    ("batch_size", "count", "expected"), [(8, 2, 4), (8, 8, 1), (99, 3, 8), (25, 5, 4), (24, 1, 24)]
)
def test_a_batch_comes_in_equal_chunks_and_is_cut_to_the_training_split(
    batch_size: int, count: int, expected: int
) -> None:
    module = make_module(6, batch_size=batch_size, batch_chunk_count=count)  # 24 patches
    assert (module.chunk_size, module.batch_size) == (expected, expected * count)
    assert module.accumulation_steps == module.batch_chunk_count == count
    assert {len(batch["image"]) for batch in module.train_dataloader()} <= {expected, 24 % expected}


def test_cutting_a_batch_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "monai_patchqueue"):
        module = make_module(6, batch_size=100)
        module.train_dataloader()
        make_module(6, batch_size=24)
    assert [record.message for record in caplog.records] == [
        "batch_size=100 is cut to 24: the training split gives 24 patches in an epoch on each rank."
    ]


def test_chunks_can_be_chosen_anew() -> None:
    module = make_module(6, batch_size=4)
    module.set_chunk_size(12, 3)
    assert (module.batch_size, module.batch_chunk_count, module.chunk_size) == (12, 3, 4)
    with pytest.raises(ValueError, match="cannot be divided"):
        module.set_chunk_size(12, 5)
    assert (module.batch_size, module.batch_chunk_count) == (12, 3)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("train_loader", ["queue", "plain"])
def test_an_incomplete_batch_is_dropped_with_all_its_chunks(train_loader: Any, balanced: bool) -> None:
    options: dict[str, Any] = {"train_loader": train_loader, "balance_sampler_by_class": balanced, "class_key": "class"}
    size = 2 if train_loader == "queue" else 1
    # 11 volumes of 2 patches each; batches of 8 patches in 4 chunks: 2 whole batches and 3 chunks that are over
    module = make_module(11, train_transforms=crop(2), batch_size=4 * size, batch_chunk_count=4, **options)
    assert len(module.train_dataloader()) == 11
    module.drop_incomplete_batch = True
    loader = module.train_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == 8
        assert {len(batch["image"]) for batch in batches} == {2}


def weights_after(trainer_of: Any, **chunks: Any) -> torch.Tensor:
    """A network's weights after two epochs of one split, whatever chunks its batches come in."""
    arguments = {"queue_length": 24, "warmup": 24}
    module = make_module(7, drop_incomplete_batch=True, train_loader_arguments=arguments, **chunks)
    torch.manual_seed(0)
    network = torch.nn.Conv2d(1, 1, 3, padding=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    loader = module.train_dataloader()
    trainer_of(network, optimizer, loader, module.accumulation_steps)
    return network.weight.detach()


def train_with_monai(network: Any, optimizer: Any, loader: Any, steps: int) -> None:
    SupervisedTrainer(
        device="cpu",
        max_epochs=2,
        train_data_loader=loader,
        network=network,
        optimizer=optimizer,
        loss_function=torch.nn.functional.mse_loss,
        accumulation_steps=steps,
    ).run()


def train_with_ignite(network: Any, optimizer: Any, loader: Any, steps: int) -> None:
    trainer = create_supervised_trainer(
        network,
        optimizer,
        torch.nn.functional.mse_loss,
        prepare_batch=lambda batch, device, non_blocking: (batch["image"], batch["label"]),
        gradient_accumulation_steps=steps,
    )
    trainer.run(loader, max_epochs=2)


@pytest.mark.parametrize("trainer_of", [train_with_monai, train_with_ignite])
def test_chunks_and_accumulation_train_as_whole_batches_do(trainer_of: Any) -> None:
    whole = weights_after(trainer_of, batch_size=8)  # 28 patches: 3 whole batches
    chunks = weights_after(trainer_of, batch_size=8, batch_chunk_count=4)
    untrained = weights_after(lambda *_: None, batch_size=8)
    torch.testing.assert_close(chunks, whole)
    assert not torch.allclose(whole, untrained)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("parallel", "expected"), [(-1, 0), (-7, 0), (0, 3), (1, 1), (5, 5)])
def test_parallel_is_a_number_of_workers(parallel: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_patchqueue.data.data_module.available_cpus", lambda: 2.5)
    module = make_module(3, parallel=parallel)
    assert module.num_workers == expected
    assert module.train_dataloader().num_workers == expected
    assert module.val_dataloader()["validation"].num_workers == expected


def test_ranks_of_a_host_share_its_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_patchqueue.data.data_module.available_cpus", lambda: 6.0)
    found = []
    for ranks in ("1", "4", "16"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        found.append(make_module(3, parallel=0).num_workers)
    assert found == [6, 2, 1]


@pytest.mark.parametrize("train_loader", ["queue", "plain"])
def test_workers_give_what_the_calling_process_gives(train_loader: Any) -> None:
    module = make_module(6, train_loader=train_loader)
    alone = numbers(module.train_dataloader())
    module.parallel = 2
    loader = module.train_dataloader()
    assert loader.num_workers == 2
    assert numbers(loader) == alone
    module.teardown()


def add(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value + 1 if key in ("image", "label", "number") else value for key, value in item.items()}


def test_model_transforms_follow_the_loader_in_all_splits_and_can_be_chosen_anew() -> None:
    module = make_module(3, model_transforms=add, cache_samples=True)
    assert module.model_transforms == (add,)
    assert Counter(numbers(module.train_dataloader())) == {1: 4, 2: 4, 3: 4}
    assert numbers(module.val_dataloader()["validation"]) == [101, 102, 103]
    module.model_transforms = [add, add]
    assert Counter(numbers(module.train_dataloader())) == {2: 4, 3: 4, 4: 4}
    assert numbers(module.test_dataloader()["test"]) == [102, 103, 104]
    with pytest.raises(TypeError, match="model_transforms has a str"):
        module.model_transforms = "add"
    assert module.model_transforms == (add, add)


def test_model_transforms_that_cannot_work_leave_the_module_as_it_was() -> None:
    module = make_module(3, batch_size=4)
    before = numbers(module.train_dataloader())
    with pytest.raises(ValueError, match="nest"):
        module.model_transforms = crop(2)
    assert module.model_transforms == ()
    assert numbers(module.train_dataloader()) == before


def test_the_numbers_of_patches_follow_the_transforms() -> None:
    module = make_module(3, train_transforms=(), model_transforms=crop(5), batch_size=100)
    assert module.batch_size == 15
    module.model_transforms = crop(2)
    assert module.batch_size == 6
    own = [{**record, "count": record["number"]} for record in records(range(1, 4))]
    module = make_module([(own, Numbered())], train_transforms=crop("count"), batch_size=6)
    assert Counter(numbers(module.train_dataloader())) == {1: 1, 2: 2, 3: 3}


def test_a_split_is_checked_by_loading_a_sample_of_each_database(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = Numbered(), Numbered(broken=5)
    module = make_module([(records(range(3)), good), (records(range(5, 8)), bad)], others=("test",))
    with caplog.at_level(logging.INFO, "monai_patchqueue"):
        reports = module.check_split()
    assert [(report.split, report.database, report.error is None) for report in reports] == [
        ("test", 0, True),
        ("train", 0, True),
        ("train", 1, False),
    ]
    assert (reports[0].patches, reports[1].patches) == (1, 4)
    assert reports[0].contents == {
        "number": "int", "class": "str", "image": "[1, 16, 16] float32", "label": "[1, 16, 16] float32"
    }  # fmt: skip
    assert (reports[1].contents or {})["image"] == "[1, 8, 8] float32"
    assert "OSError: this file is cut off" in str(reports[2])
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "ERROR"]
    assert (good.loaded, bad.loaded) == ([0], [5])
    assert [report.error is None for report in module.check_split(limit=9)] == [True] * 3 + [True] * 3 + [
        False,
        True,
        True,
    ]


def test_a_module_says_what_it_has() -> None:
    module = make_module(6, batch_size=8, batch_chunk_count=2, database_name="liver", split_name="fold-0")
    volumes = "{'validation': 3, 'test': 3, 'train': 6}"
    expected = f"PatchDataModule('liver', 'fold-0', volumes={volumes}, batch_size=8, batch_chunk_count=2)"
    assert repr(module) == str(module) == expected


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_and_what_comes_out_of_a_pickle_give_the_same_batches(copied: Any) -> None:
    module = make_module(6, cache_samples=True, parallel=1)
    expected = digest(module.train_dataloader())
    other = copied(module)
    assert type(other) is type(module)
    assert digest(other.train_dataloader()) == expected
    for each in (module, other):
        each.teardown()


@pytest.mark.parametrize("balanced", [False, True])
def test_training_goes_on_in_mid_epoch(balanced: bool) -> None:
    def make() -> Any:
        module = make_module(7, balance_sampler_by_class=balanced, class_key="class", parallel=1)
        return module.train_dataloader()

    with make() as loader:
        whole = [digest([batch]) for _ in range(2) for batch in loader]
    with make() as loader:
        batches = (digest([batch]) for _ in range(2) for batch in loader)
        begun = [next(batches) for _ in range(len(loader) + 3)]
        state = loader.state_dict()
    with make() as loader:
        loader.load_state_dict(state)
        assert begun + [digest([batch]) for batch in loader] == whole


@pytest.mark.parametrize("train_loader", ["queue", "plain"])
def test_ranks_draw_balanced_and_step_together(train_loader: Any, tmp_path: Path) -> None:
    counts = [1, 7, 3, 3, 1, 1, 4]
    own = [{"number": n, "class": "a" if n < 3 else "b", "count": c} for n, c in enumerate(counts)]

    def rank() -> Any:
        module = PatchDataModule(
            {"train": [(own, Numbered(size=8))], "validation": [(records(range(5)), Numbered(size=8))]},
            batch_size=4,
            batch_chunk_count=2,
            drop_incomplete_batch=True,
            balance_sampler_by_class=True,
            class_key="class",
            train_transforms=crop("count" if train_loader == "queue" else 1),
            train_loader=train_loader,
            seed=1,
        )
        loader = module.train_dataloader()
        drawn = []
        for epoch in range(50):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            for batch in loader:
                drawn.append(numbers([batch]))
                dist.all_reduce(torch.ones(1))
        draws = [number for epoch in range(200) for number in _order(loader.sampler, epoch)]
        return len(loader), drawn, draws, numbers(module.val_dataloader()["validation"])

    one, other = on_ranks(2, rank, tmp_path)
    assert one[0] == other[0] > 0
    assert [len(batch) for batch in one[1]] == [len(batch) for batch in other[1]] == [2] * (50 * one[0])
    assert one[2] != other[2]
    given = np.asarray(counts if train_loader == "queue" else [1] * 7)
    chances = np.concatenate([np.full(3, 1 / given[:3].sum()), np.full(4, 1 / given[3:].sum())])
    if train_loader == "plain":
        for draws in (one[2], other[2]):
            assert p_value(np.bincount(draws, minlength=7), chances) > 1e-3
    patches = np.bincount([n for result in (one, other) for batch in result[1] for n in batch], minlength=7)
    assert abs(patches[:3].sum() / patches.sum() - 0.5) < 0.05
    assert len(one[3]) == len(other[3]) == 3


def _order(sampler: Any, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_ranks_share_what_is_not_balanced(tmp_path: Path) -> None:
    def rank() -> Any:
        module = make_module(7, others=("validation",), train_transforms=crop(2), batch_size=4)
        loader = module.train_dataloader()
        return len(loader), numbers(loader), numbers(module.val_dataloader()["validation"])

    one, other = on_ranks(2, rank, tmp_path)
    assert one[0] == other[0] == 2
    assert len(set(one[1]) & set(other[1])) <= 1
    assert len(one[1]) == len(other[1]) == 7
    assert sorted(one[2] + other[2]) == [100, 101, 102]
