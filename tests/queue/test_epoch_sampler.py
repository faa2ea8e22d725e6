# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from monai_patchqueue.queue.epoch_sampler import EpochSampler
from tests.sampling.chi_square import p_value


def on_each_rank(world: int, *arguments: Any, **options: Any) -> list[EpochSampler]:
    return [EpochSampler(*arguments, num_replicas=world, rank=rank, **options) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_the_volumes_and_get_equally_many(world: int) -> None:
    samplers = on_each_rank(world, 11)
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(sampler) for sampler in samplers} == {-(-11 // world)}
    seen = Counter(volume for share in shares for volume in share)
    assert set(seen) == set(range(11))
    assert sum(seen.values()) - 11 == -11 % world


def test_more_ranks_than_volumes_share_them_by_turns() -> None:
    assert [list(sampler) for sampler in on_each_rank(5, 2, shuffle=False)] == [[0], [1], [0], [1], [0]]


@pytest.mark.parametrize("world", [1, 3])
def test_each_ranks_draws_follow_the_weights_of_all_volumes(world: int) -> None:
    weights = [4.0, 0.0, 1.0, 2.5, 0.5]
    torch.manual_seed(0)
    for sampler in on_each_rank(world, 5, weights=weights, length=20_000, seed=3):
        draws = np.bincount(list(sampler), minlength=5)
        assert draws.sum() == 20_000
        assert p_value(draws, np.asarray(weights)) > 1e-3


def test_draws_of_different_ranks_are_independent() -> None:
    first, second = (np.asarray(list(s)) for s in on_each_rank(2, 2, weights=[1, 1], length=20_000, seed=3))
    both = np.bincount(2 * first + second, minlength=4)
    assert p_value(both, np.full(4, 0.25)) > 1e-3


@pytest.mark.parametrize("length", [1, 7, 3000])
def test_drawing_goes_on_until_there_are_enough_patches(length: int) -> None:
    counts = [5, 1, 0, 3]
    for sampler in on_each_rank(2, 4, weights=[1, 1, 0, 1], counts=counts, length=length):
        patches = np.cumsum([counts[volume] for volume in sampler])
        assert patches[-1] >= length
        assert len(patches) == 1 or patches[-2] < length
        assert sampler.num_patches == length


def test_epochs_differ_and_can_be_had_again() -> None:
    alone = EpochSampler(50)
    torch.manual_seed(0)
    epochs = [list(alone) for _ in range(3)]
    torch.manual_seed(0)
    assert [list(alone) for _ in range(3)] == epochs
    assert len(set(map(tuple, epochs))) == 3
    one, other = on_each_rank(2, 50, weights=[1.0] * 50, length=50, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        one.set_epoch(epoch)
        other.set_epoch(epoch)
        orders.append((tuple(one), tuple(other)))
    assert orders[0] == orders[2] != orders[1]


def test_a_fixed_order_stays_and_leaves_the_global_generator_alone() -> None:
    sampler = EpochSampler(20, weights=[1.0] * 20, fixed=True, seed=5)
    before = torch.get_rng_state()
    first = list(sampler)
    sampler.set_epoch(3)
    assert list(sampler) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert first != list(EpochSampler(20, weights=[1.0] * 20, fixed=True, seed=6))


def test_a_generator_of_its_own_decides_alone() -> None:
    orders = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        orders.append(list(EpochSampler(30, generator=torch.Generator().manual_seed(7))))
    assert orders[0] == orders[1]
