# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter
from itertools import islice, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from monai_patchqueue.queue import schedule
from monai_patchqueue.queue.schedule import Draws, EpochPlan, seed_sequence

exactly = settings(deadline=None, derandomize=True)
orders = st.lists(st.integers(0, 6), min_size=1, max_size=12)


@st.composite
def plans(draw: Any, **fixed: Any) -> EpochPlan:
    """Any plan; keyword arguments hold some of it fixed."""
    order = draw(orders)
    counts_by_volume = draw(st.lists(st.integers(0, 5), min_size=7, max_size=7))
    counts = tuple(counts_by_volume[volume] for volume in order)
    repeats = draw(st.integers(1, 3))
    natural = sum(counts) * repeats
    arguments = {
        "seed": draw(st.integers(0, 2**64 - 1)),
        "epoch": draw(st.integers(0, 50)),
        "order": tuple(order),
        "counts": counts,
        "queue_length": draw(st.integers(1, 12) | st.integers(13, 1000)),
        "warmup": draw(st.none() | st.integers(1, 12)),
        "shuffle": draw(st.booleans()),
        "repeats": repeats,
        "draws": draw(st.none() | st.integers(1, 3 * natural + 1)),
    }
    return EpochPlan(**{**arguments, **fixed})


def drawn(plan: EpochPlan) -> list[tuple[int, int, int]]:
    return [(draw.entry, draw.patch, draw.repeat) for draw in Draws(plan)]


@exactly
@given(plans(draws=None))
def test_each_patch_is_drawn_exactly_as_often_as_it_repeats(plan: EpochPlan) -> None:
    expected = [
        (entry, patch, repeat)
        for entry, count in enumerate(plan.counts)
        for patch in range(count)
        for repeat in range(plan.repeats)
    ]
    draws = drawn(plan)
    assert sorted(draws) == expected
    assert plan.shuffle or draws == expected


@exactly
@given(plans())
def test_an_epoch_of_another_length_loses_its_last_draws_or_goes_through_its_order_again(plan: EpochPlan) -> None:
    draws = list(Draws(plan))
    assert len(draws) == plan.num_draws
    natural = sum(plan.counts) * plan.repeats
    assert plan.num_draws == (0 if not natural else natural if plan.draws is None else plan.draws)
    # Whatever is drawn was announced, and no more often than it repeats, in order of repetition.
    seen: Counter[tuple[int, int]] = Counter()
    for draw in draws:
        assert draw.patch < plan.tickets[draw.entry].count
        assert draw.repeat == seen[draw.entry, draw.patch]
        assert draw.last == (draw.repeat == plan.repeats - 1)
        seen[draw.entry, draw.patch] += 1
    # The order comes first, and as much of it again as is needed, and no more.
    laps = [plan.order[i % len(plan.order)] for i in range(len(plan.tickets))]
    assert [ticket.volume for ticket in plan.tickets] == laps
    if len(plan.tickets) > len(plan.order):
        assert sum(ticket.count for ticket in plan.tickets[:-1]) * plan.repeats < plan.num_draws


@exactly
@given(plans())
def test_occurrences_count_each_volumes_appearances(plan: EpochPlan) -> None:
    seen: Counter[int] = Counter()
    for ticket in plan.tickets:
        assert (ticket.epoch, ticket.occurrence) == (plan.epoch, seen[ticket.volume])
        seen[ticket.volume] += 1


@exactly
@given(plans(), st.data())
def test_advancing_agrees_with_the_unbroken_sequence_at_any_draw(plan: EpochPlan, data: Any) -> None:
    unbroken = list(Draws(plan))
    place = data.draw(st.integers(0, len(unbroken)))
    later = Draws(plan).advance(place)
    remaining = later.remaining()
    left = {entry: patches for entry in range(len(plan.tickets)) if (patches := remaining(entry))}
    rest = list(later)
    assert rest == unbroken[place:]
    needed: dict[int, set[int]] = {}
    for draw in rest:
        needed.setdefault(draw.entry, set()).add(draw.patch)
    if plan.draws is None or not rest:
        assert left == needed
    else:  # a truncated epoch cannot tell beforehand what it will not come to
        assert all(patches <= left[entry] for entry, patches in needed.items())
    assert not any(map(later.remaining(), range(len(plan.tickets))))


@exactly
@given(plans())
def test_only_patches_of_the_window_are_drawn_and_it_grows_by_its_law(plan: EpochPlan) -> None:
    draws = Draws(plan)
    left = 0
    farthest = -1
    for number, draw in enumerate(draws):
        size = plan.queue_length
        if plan.warmup is not None:
            size = min(plan.queue_length, plan.warmup + number // 8)
        assert plan.window_size(number) == size
        patch = plan.starts[draw.entry] + draw.patch
        farthest = max(farthest, patch)
        # The window begins as the oldest patches and takes in one for each that has left.
        assert patch < left + (size if plan.shuffle else 1)
        left += draw.last


@exactly
@given(plans(shuffle=True), st.integers(1, 40))
def test_draws_do_not_depend_on_how_random_numbers_are_blocked(plan: EpochPlan, block: int) -> None:
    expected = drawn(plan)
    before = schedule._BLOCK
    schedule._BLOCK = block
    try:
        assert drawn(plan) == expected
    finally:
        schedule._BLOCK = before


@exactly
@given(plans(shuffle=True, repeats=1, draws=None, warmup=None))
def test_a_queue_longer_than_the_epoch_makes_no_difference(plan: EpochPlan) -> None:
    total = sum(plan.counts)

    def of(length: int) -> list[tuple[int, int, int]]:
        fixed = {name: getattr(plan, name) for name in ("seed", "epoch", "order", "counts")}
        return drawn(EpochPlan(**fixed, queue_length=length))

    assert of(max(total, 1)) == of(total + 1) == of(10 * total + 7)


def exact_sequences(patches: int, window: int) -> dict[tuple[int, ...], float]:
    """Probability of each order of draws from a window of so many patches, by enumeration."""

    def probability(order: tuple[int, ...]) -> float:
        held = list(range(min(window, patches)))
        following = len(held)
        p = 1.0
        for patch in order:
            if patch not in held:
                return 0.0
            p /= len(held)
            held.remove(patch)
            if following < patches:
                held.append(following)
                following += 1
        return p

    found = {order: probability(order) for order in permutations(range(patches))}
    return {order: p for order, p in found.items() if p}


@pytest.mark.parametrize(("patches", "window"), [(4, 4), (4, 2), (5, 3)])
def test_every_order_of_draws_has_its_exact_probability(patches: int, window: int) -> None:
    exact = exact_sequences(patches, window)
    assert sum(exact.values()) == pytest.approx(1)
    runs = 3000
    counts = Counter(
        tuple(draw.patch for draw in Draws(EpochPlan(1, epoch, (0,), (patches,), queue_length=window)))
        for epoch in range(runs)
    )
    assert counts.keys() <= exact.keys()
    observed = [counts[order] for order in exact]
    assert chisquare(observed, [p * runs for p in exact.values()]).pvalue > 1e-3


def test_each_draw_is_uniform_over_a_window_in_steady_state() -> None:
    plan = EpochPlan(3, 1, tuple(range(4000)), (1,) * 4000, queue_length=8)
    held, following, places = list(range(8)), 8, np.zeros(8)
    for draw in islice(Draws(plan), 3900):
        places[sorted(held).index(draw.entry)] += 1
        held.remove(draw.entry)
        held.append(following)
        following += 1
    # Not by age alone: the oldest is drawn as often as the newest.
    assert chisquare(places).pvalue > 1e-3


def test_seeds_epochs_and_purposes_have_random_streams_of_their_own() -> None:
    words = {
        tuple(seed_sequence(seed, *key).generate_state(2).tolist())
        for seed in range(4)
        for key in [(0, 1), (1, 0), (2, 0), (0, 0), (1, 0, 0, 0), (1, 0, 0, 1), (1, 0, 1, 0), (1, 1, 0, 0)]
    }
    assert len(words) == 32


def test_an_epoch_draws_by_seed_and_epoch() -> None:
    def of(seed: int, epoch: int) -> list[tuple[int, int, int]]:
        return drawn(EpochPlan(seed, epoch, tuple(range(8)), (4,) * 8, queue_length=16))

    assert of(0, 0) == of(0, 0)
    assert len({tuple(of(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@exactly
@given(plans(draws=None), st.data())
def test_a_failed_volume_is_replaced_by_each_other_volume_once_with_new_patches(plan: EpochPlan, data: Any) -> None:
    entry = data.draw(st.integers(0, len(plan.tickets) - 1))
    failed = plan.tickets[entry]
    others = {t.volume for t in plan.tickets if t.count} - {failed.volume}
    replacements = [plan.replacement(entry, attempt) for attempt in range(len(others) + 2)]
    assert replacements[len(others) :] == [None, None]
    chosen = [replacement for replacement in replacements if replacement is not None]
    assert {ticket.volume for ticket in chosen} == others
    assert len(chosen) == len(others)
    known = {(ticket.volume, ticket.occurrence) for ticket in plan.tickets}
    assert not known & {(ticket.volume, ticket.occurrence) for ticket in chosen}
