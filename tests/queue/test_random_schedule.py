# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_patchqueue.queue.laps import Laps
from monai_patchqueue.queue.random_schedule import RandomDraws, RandomPlan, Residents, ReusePolicy
from tests.sampling.chi_square import p_value

exactly = settings(max_examples=60, deadline=None, derandomize=True)


def policy(batch_size: int = 2, **arguments: Any) -> ReusePolicy:
    return ReusePolicy(
        **{
            "batch_size": batch_size,
            "always": False,
            "samples_per_insert": None,
            "min_size_to_sample": batch_size,
            **arguments,
        }
    )


def begun(plan: RandomPlan, fill: int) -> RandomDraws:
    draws = plan.drawing(0, plan.policy.batch_size)
    draws.allow(10**9)
    draws.begin(fill)
    return draws


def batch(draws: RandomDraws) -> list[int]:
    assert draws.ready
    return [next(draws).item for _ in range(draws.plan.policy.batch_size)]


@st.composite
def plans(draw: Any) -> tuple[RandomPlan, int]:
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=8).filter(any))
    batch_size = draw(st.integers(1, 5))
    least = draw(st.integers(batch_size, batch_size + 3))
    length = draw(st.integers(least, least + 8))
    chosen = policy(
        batch_size,
        samples_per_insert=draw(st.none() | st.sampled_from([0.5, 1, 1.7, 8])),
        min_size_to_sample=least,
        max_times_sampled=draw(st.none() | st.integers(1, 3)),
        priority_exponent=draw(st.none() | st.just(0.7)),
    )
    seed = draw(st.integers(0, 9))
    return RandomPlan(seed, Laps(seed, counts), length, chosen), draw(st.integers(least, length))


@exactly
@given(plans())
def test_items_enter_in_order_and_leave_in_order_and_none_comes_twice_in_a_batch(case: tuple[RandomPlan, int]) -> None:
    plan, fill = case
    draws, chosen = begun(plan, fill), plan.policy
    present, entered = dict.fromkeys(range(fill), 0), fill
    for number in range(1, 40):
        drawn = batch(draws)
        assert len(set(drawn)) == len(drawn)
        assert all(item in present for item in drawn)
        for item in drawn:
            present[item] += 1
        gone = [plan.laps.items_of(entry)[patch] for entry, patch in draws.leaving()]
        spent = [item for item in present if present[item] == chosen.max_times_sampled]
        assert set(spent) <= set(gone)
        for item in spent:
            del present[item]
        due = fill + int(number * chosen.batch_size / (chosen.samples_per_insert or chosen.batch_size))
        for item in range(entered, max(due, entered)):
            present[item] = 0
        entered = max(due, entered)
        oldest_first = [item for item in gone if item not in spent]
        assert oldest_first == list(present)[: max(len(present) - plan.queue_length, 0)]
        for item in oldest_first:
            del present[item]
        while len(present) < chosen.min_size_to_sample:
            present[entered] = 0
            entered += 1


@exactly
@given(plans(), st.integers(0, 30))
def test_a_run_goes_on_from_its_state_with_the_same_draws(case: tuple[RandomPlan, int], stop: int) -> None:
    plan, fill = case
    unbroken = begun(plan, fill)

    def step(draws: RandomDraws) -> list[Any]:
        drawn = [next(draws) for _ in range(plan.policy.batch_size)]
        draws.update_priorities([draw.item for draw in drawn], [1.0 + draw.item % 3 for draw in drawn])
        return [(draw.entry, draw.patch, draw.repeat, draw.item, draw.weight) for draw in drawn]

    for _ in range(stop):
        step(unbroken)
    state = unbroken.residents(stop).as_dict()
    laps = Laps(plan.seed, plan.laps._counts)
    resumed = RandomPlan(plan.seed, laps, plan.queue_length, plan.policy, Residents.from_dict(state)).drawing(stop, 1)
    resumed.allow(10**9)
    left = resumed.remaining()
    first = resumed.first_entry
    needed: dict[int, set[int]] = {}
    for _ in range(15):
        expected = step(unbroken)
        assert step(resumed) == expected
        for entry, patch, *_ in expected:
            needed.setdefault(entry, set()).add(patch)
    assert all(entry >= first and patches <= left(entry) for entry, patches in needed.items())


def test_draws_are_uniform_over_what_is_there_and_so_are_pairs() -> None:
    plan = RandomPlan(3, Laps(3, (1,) * 5), 5, policy(2, samples_per_insert=1e9))
    draws = begun(plan, 5)
    pairs = Counter(tuple(batch(draws)) for _ in range(6_000))
    assert p_value(np.array([pairs[pair] for pair in permutations(range(5), 2)]), np.full(20, 1 / 20)) > 0.001


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_prioritized_draws_have_their_exact_probabilities_without_replacement(exponent: float) -> None:
    plan = RandomPlan(1, Laps(1, (1,) * 4), 4, policy(2, samples_per_insert=1e9, priority_exponent=exponent))
    draws = begun(plan, 4)
    priorities = np.array([1.0, 2.0, 5.0, 0.5])
    draws.update_priorities(range(4), priorities.tolist())
    pairs = Counter(tuple(batch(draws)) for _ in range(6_000))
    p = priorities**exponent / (priorities**exponent).sum()
    expected = {(a, b): p[a] * p[b] / (1 - p[a]) for a, b in permutations(range(4), 2)}
    assert p_value(np.array([pairs[pair] for pair in expected]), np.array(list(expected.values()))) > 0.001


def test_importance_weights_undo_the_priorities() -> None:
    chosen = policy(4, samples_per_insert=1e9, priority_exponent=1.0, importance_exponent=1.0)
    draws = begun(RandomPlan(1, Laps(1, (1,) * 4), 4, chosen), 4)
    draws.update_priorities(range(4), [1.0, 2.0, 4.0, 8.0])
    weights = {draw.item: draw.weight for draw in (next(draws) for _ in range(4))}
    assert weights == {0: 1.0, 1: 0.5, 2: 0.25, 3: 0.125}


def test_what_has_no_priority_is_drawn_when_nothing_else_is_left() -> None:
    chosen = policy(2, samples_per_insert=1e9, priority_exponent=1.0, importance_exponent=0.4)
    draws = begun(RandomPlan(1, Laps(1, (1,) * 4), 4, chosen), 4)
    draws.update_priorities(range(4), [0.0, 3.0, 0.0, 0.0])
    drawn = [[next(draws) for _ in range(2)] for _ in range(300)]
    assert all(first.item == 1 and second.item in (0, 2, 3) for first, second in drawn)
    assert all(np.isfinite([draw.weight for pair in drawn for draw in pair]))
    draws.update_priorities(range(4), [0.0] * 4)
    assert len({item for _ in range(100) for item in batch(draws)}) == 4


def test_items_that_enter_have_the_highest_priority_so_far_and_those_that_left_no_say() -> None:
    draws = begun(RandomPlan(1, Laps(1, (1,) * 9), 3, policy(1, priority_exponent=1.0)), 3)
    draws.update_priorities([0, 1, 77], [7.0, 2.0, 5.0])
    batch(draws)
    batch(draws)
    assert draws.residents(2).priorities == (1.0, 7.0, 7.0)
    assert draws.residents(2).highest == 7.0


def test_always_draws_from_what_has_landed_and_the_first_to_come_leaves_first() -> None:
    plan = RandomPlan(0, Laps(0, (2, 2, 2, 2)), 4, policy(2, always=True))
    draws = plan.drawing(0, 2)
    assert draws.landed(2) == []
    draws.begin(2)
    assert set(batch(draws)) == {4, 5}
    assert draws.landed(0) == []
    assert draws.available == 4
    assert draws.landed(5) == [(2, 0), (2, 1)]
    assert {item for _ in range(60) for item in batch(draws)} == {0, 1, 10, 11}
    assert draws.landed(1) == [(0, 0), (0, 1)]


def test_always_keeps_the_laps_of_volumes_that_are_still_on_their_way() -> None:
    plan = RandomPlan(0, Laps(0, (1, 1)), 2, policy(1, always=True))
    draws = plan.drawing(0, 1)
    draws.landed(1)
    draws.begin(1)
    for entry in range(2, 60):
        draws.landed(entry)
        batch(draws)
    assert draws.landed(0) == [(58, 0)]
    assert {item for _ in range(20) for item in batch(draws)} == {59, 0}


def test_samples_per_insert_limits_reuse_where_items_come_as_they_can() -> None:
    plan = RandomPlan(0, Laps(0, (1,) * 8), 8, policy(2, always=True, samples_per_insert=3.0))
    draws = plan.drawing(0, 2)
    drawn = 0
    draws.begin(0)
    for entry in range(20):
        draws.landed(entry)
        while draws.ready:
            drawn += len(batch(draws))
        assert drawn <= 3 * (entry + 1)
    assert drawn == 60


def test_draws_on_demand_wait_until_they_are_asked_for() -> None:
    draws = RandomPlan(0, Laps(0, (1,) * 8), 8, policy(2, max_times_sampled=2)).drawing(0, 2)
    draws.begin(8)
    assert not draws.ready
    draws.allow(1)
    batch(draws)
    assert not draws.ready


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_each_lap_has_every_volume_once_on_one_rank(replicas: int) -> None:
    counts = (2, 0, 1, 3, 1, 2, 2)
    ranks = [Laps(5, counts, rank, replicas) for rank in range(replicas)]
    orders = []
    for number in range(3):
        tickets = []
        for laps in ranks:
            tickets.append([t for t in (laps.ticket(entry) for entry in range(30)) if t.epoch == number])
        orders.append([ticket.volume for of_rank in tickets for ticket in of_rank])
        assert sorted(orders[-1]) == [0, 2, 3, 4, 5, 6]
    assert orders[0] != orders[1] != orders[2]


@exactly
@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 5))
def test_no_volume_comes_again_within_its_distance(volumes: int, apart: int, seed: int) -> None:
    laps = Laps(seed, (1,) * volumes, apart=apart)
    order = [laps.ticket(entry).volume for entry in range(6 * volumes)]
    for lap in range(6):
        assert sorted(order[lap * volumes :][:volumes]) == list(range(volumes))
    near = min(apart, volumes)
    assert all(len(set(order[i : i + near])) == near for i in range(len(order) - near))


def test_the_first_lap_is_a_uniform_permutation_and_so_are_later_ones_that_are_free() -> None:
    orders = Counter()
    for seed in range(3000):
        laps = Laps(seed, (1, 1, 1))
        for lap in range(2):
            orders[tuple(laps.ticket(3 * lap + place).volume for place in range(3))] += 1
    assert p_value(np.array([orders[p] for p in permutations(range(3))]), np.full(6, 1 / 6)) > 0.001


def test_items_are_numbered_without_gaps_through_all_laps() -> None:
    laps = Laps(5, (2, 0, 1, 3))
    places = [(entry, patch) for entry in range(20) for patch in range(len(laps.items_of(entry)))]
    assert [laps.place_of(item) for item in range(len(places))] == places
    assert [laps.ticket(entry).count for entry in range(20)] == [len(laps.items_of(entry)) for entry in range(20)]
    laps.forget(30)
    assert [laps.place_of(item) for item in range(30, 40)] == places[30:40] or len(places) < 40


def test_more_ranks_than_data_are_refused() -> None:
    with pytest.raises(ValueError, match="2 items for 3 ranks"):
        Laps(0, (1, 0, 1), 0, 3)
