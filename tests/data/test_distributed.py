# SPDX-License-Identifier: Apache-2.0
"""Several ranks: their own volumes, the same number of steps, the sampler's own epochs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from monai.data import DistributedSampler as MonaiDistributedSampler
from monai.data import DistributedWeightedRandomSampler, partition_dataset
from monai.engines import SupervisedTrainer
from torch.utils.data import DistributedSampler, Sampler

from monai_patchqueue import PatchQueueLoader
from tests.data.step_together import COUNTS, one_epoch
from tests.pipelines import Patches, digest, drawn, make_loader
from tests.processes import on_ranks, wait_for

pytestmark = pytest.mark.timeout(90)


class Every(Sampler[int]):
    """A rank's share of the volumes, in an order of its own: as somebody may write it who knows no better class."""

    def __init__(self, dataset: Patches) -> None:
        self.size = len(dataset)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter(order[dist.get_rank() :: dist.get_world_size()][: len(self)])

    def __len__(self) -> int:
        return self.size // dist.get_world_size()


SAMPLERS: dict[str, Callable[[Patches], Any]] = {
    "torch": DistributedSampler,
    "torch, drop_last": partial(DistributedSampler, drop_last=True),
    "monai": MonaiDistributedSampler,
    "monai, uneven": partial(MonaiDistributedSampler, even_divisible=False),
    "custom": Every,
}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_ranks_draw_from_volumes_of_their_own_and_step_together(kind: str, world: int, tmp_path: Path) -> None:
    def rank() -> Any:
        dataset = Patches(COUNTS)
        sampler, twin = SAMPLERS[kind](dataset), SAMPLERS[kind](dataset)
        epochs = []
        with make_loader(dataset, 1, sampler=sampler, batch_size=3) as loader:
            before = 0, 0
            for epoch in range(3):
                sampler.set_epoch(epoch)
                twin.set_epoch(epoch)
                steps = len(loader)
                batches = one_epoch(loader)
                after = loader.stats().lost_draws, loader.stats().extra_draws
                changes = after[0] - before[0], after[1] - before[1]
                epochs.append((list(twin), drawn(batches), len(batches), steps, len(loader), *changes))
                before = after
        return epochs

    for ranks in zip(*on_ranks(world, rank, tmp_path), strict=True):
        volumes = []
        for order, draws, steps, announced, afterwards, lost, extra in ranks:
            assert steps == announced == afterwards == ranks[0][2]
            assert {volume for volume, _ in draws} <= set(order)
            assert len(draws) == sum(COUNTS[volume] for volume in order) + extra - lost
            assert not lost or not extra
            volumes.append({volume for volume, _ in draws})
        padding = sum(len(order) for order, *_ in ranks) - len({v for order, *_ in ranks for v in order})
        shared = sum(len(one & other) for one, other in combinations(volumes, 2))
        assert shared <= padding <= (world - 1 if kind in ("torch", "monai") else 0)


def test_a_weighted_sampler_draws_as_many_volumes_as_it_is_told_to(tmp_path: Path) -> None:
    def rank() -> Any:
        dataset = Patches([4] * 6)
        sampler = DistributedWeightedRandomSampler(dataset, weights=[1.0] * 6, num_samples_per_rank=9)
        with make_loader(dataset, 1, sampler=sampler, batch_size=4) as loader:
            batches = one_epoch(loader)
            return len(loader), len(drawn(batches)), loader.stats().lost_draws, loader.stats().extra_draws

    assert on_ranks(2, rank, tmp_path) == [(9, 36, 0, 0)] * 2


def orders(loader: PatchQueueLoader) -> list[int]:
    """The volumes in the order in which an unshuffled loader draws them."""
    return list(dict.fromkeys(volume for volume, _ in drawn(one_epoch(loader))))


@pytest.mark.parametrize("through", ["sampler", "loader"])
@pytest.mark.parametrize("kind", ["torch", "monai", "custom"])
def test_epochs_are_the_samplers_own_whatever_was_prepared_ahead(kind: str, through: str, tmp_path: Path) -> None:
    epochs = [0, 1, 2, 7, 3, 3, 4]

    def rank() -> Any:
        dataset = Patches([2] * 8)
        sampler, twin = SAMPLERS[kind](dataset), SAMPLERS[kind](dataset)
        arguments: dict[str, Any] = {"batch_size": 4, "queue_length": 4, "shuffle_patches": False}
        seen, expected = [], []
        with make_loader(dataset, 2, sampler=sampler, **arguments) as loader:
            for epoch in epochs:
                (sampler if through == "sampler" else loader).set_epoch(epoch)
                twin.set_epoch(epoch)
                seen.append(orders(loader))
                expected.append(list(twin))
                wait_for(lambda: loader.stats().fill >= 1, "the next epoch's volumes")  # as guessed
        return seen, expected

    results = on_ranks(2, rank, tmp_path)
    for seen, expected in results:
        assert seen == expected
        assert len({tuple(order) for order in expected}) > 3
    assert all(not set(one) & set(other) for one, other in zip(results[0][0], results[1][0], strict=True))


def test_monais_trainer_names_its_epochs_to_the_sampler(tmp_path: Path) -> None:
    def rank() -> Any:
        dataset = Patches([2] * 8)
        sampler = DistributedSampler(dataset, seed=3)
        seen: dict[int, list[int]] = {}

        def step(engine: SupervisedTrainer, batch: Any) -> dict[str, Any]:
            seen.setdefault(engine.state.epoch, []).extend(batch["volume"].tolist())
            dist.all_reduce(torch.ones(1))
            return {}

        with make_loader(dataset, 2, sampler=sampler, batch_size=2, shuffle_patches=False) as loader:
            network = torch.nn.Conv2d(1, 1, 1)
            optimizer = torch.optim.SGD(network.parameters(), 0.1)
            trainer = SupervisedTrainer(
                "cpu", 4, loader, network, optimizer, torch.nn.MSELoss(), iteration_update=step, decollate=False
            )
            trainer.run()
        twin = DistributedSampler(dataset, seed=3)
        expected = {}
        for epoch in range(1, 5):
            twin.set_epoch(epoch)
            expected[epoch] = [volume for volume in twin for _ in range(2)]
        return seen == expected, seen, expected

    for same, seen, expected in on_ranks(2, rank, tmp_path):
        assert same, (seen, expected)


@pytest.mark.parametrize("even", [True, False])
def test_each_rank_can_have_a_partition_of_the_data(even: bool, tmp_path: Path) -> None:
    def rank() -> Any:
        parts = partition_dataset(
            list(range(7 if even else 6)), num_partitions=dist.get_world_size(), shuffle=True, even_divisible=even
        )
        part = parts[dist.get_rank()]
        with make_loader(Patches([3] * len(part)), 1, shuffle=True, batch_size=2) as loader:
            lengths = [len(one_epoch(loader)) for _ in range(2)]
            return [len(loader), *lengths], part

    results = on_ranks(2, rank, tmp_path)
    assert results[0][0] == results[1][0]
    assert len(set(results[0][1]) & set(results[1][1])) <= even


@pytest.mark.parametrize("kind", ["torch", "monai, uneven", "custom"])
def test_each_rank_resumes_where_it_was(kind: str, tmp_path: Path) -> None:
    stop = 6

    def loader_of(workers: int) -> PatchQueueLoader:
        dataset = Patches(COUNTS)
        return make_loader(dataset, workers, sampler=SAMPLERS[kind](dataset), batch_size=3, queue_length=6)

    def epochs(loader: PatchQueueLoader, first: int, last: int) -> Iterator[str]:
        for epoch in range(first, last):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            for batch in loader:
                dist.all_reduce(torch.ones(1))
                yield digest([batch])

    def unbroken() -> list[str]:
        return list(epochs(loader_of(0), 0, 3))

    def broken() -> list[str]:
        file = tmp_path / f"state_{dist.get_rank()}"
        with loader_of(2) as loader:
            batches = epochs(loader, 0, 3)
            seen = [next(batches) for _ in range(stop)]
            torch.save(loader.state_dict(), file)
        return seen

    def resumed() -> list[str]:
        with loader_of(1) as loader:
            loader.load_state_dict(torch.load(tmp_path / f"state_{dist.get_rank()}", weights_only=True))
            return list(epochs(loader, loader.state_dict()["epoch"], 3))

    expected = on_ranks(2, unbroken, tmp_path)
    assert expected[0] != expected[1]
    seen = on_ranks(2, broken, tmp_path)
    rest = on_ranks(2, resumed, tmp_path)
    for rank in range(2):
        assert seen[rank] + rest[rank] == expected[rank]


def test_fewer_volumes_than_ranks_are_a_clear_error(tmp_path: Path) -> None:
    def rank() -> list[str]:
        dataset = Patches([3, 3])
        messages = []
        for sampler in (DistributedSampler(dataset), MonaiDistributedSampler(dataset)):
            with pytest.raises(ValueError, match="ranks") as caught:
                make_loader(dataset, sampler=sampler)
            messages.append(str(caught.value))
        with pytest.raises(ValueError, match="gives no volume") as caught:
            list(make_loader(dataset, sampler=Every(dataset)))
        return [*messages, str(caught.value)]

    for messages in on_ranks(3, rank, tmp_path):
        assert all("2 volumes for 3 ranks" in message for message in messages[:2]), messages
        assert "Every" in messages[2]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_torchrun_starts_ranks_that_step_together(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(port), str(root / "tests/data/step_together.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    for rank in ranks:
        assert rank["ranks_here"] == 2
        assert [len(draws) for draws in rank["epochs"]] == [14, 14]
        assert rank["steps"] == 5
    for one, other in zip(ranks[0]["epochs"], ranks[1]["epochs"], strict=True):
        assert len({v for v, _ in one} & {v for v, _ in other}) <= 1
