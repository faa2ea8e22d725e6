# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monai_patchqueue import PatchDataModule
from monai_patchqueue.data.balancing import balanced_weights
from monai_patchqueue.queue.epoch_sampler import EpochSampler
from monai_patchqueue.queue.schedule import Draws, EpochPlan
from tests.numbered_volumes import Numbered, crop, make_module, numbers, records
from tests.sampling.chi_square import p_value

VOLUMES = st.lists(
    st.tuples(st.sampled_from("xyz"), st.sampled_from("abcd"), st.integers(1, 9)), min_size=1, max_size=30
)


@given(VOLUMES)
def test_a_patchs_chance_is_equal_for_databases_then_classes_then_patches(volumes: list[tuple[str, str, int]]) -> None:
    groups = [(database, name) for database, name, _ in volumes]
    counts = [count for *_, count in volumes]
    weights = balanced_weights(groups, counts)
    assert np.dot(weights, counts) == pytest.approx(1)
    of_database: defaultdict[str, float] = defaultdict(float)
    of_class: defaultdict[tuple[str, str], float] = defaultdict(float)
    for group, weight, count in zip(groups, weights, counts, strict=True):
        of_database[group[0]] += weight * count
        of_class[group] += weight * count
    assert all(share == pytest.approx(1 / len(of_database)) for share in of_database.values())
    for (database, _), share in of_class.items():
        classes = sum(other == database for other, _ in of_class)
        assert share == pytest.approx(1 / len(of_database) / classes)
    for group in of_class:  # volumes of a group are drawn equally often
        assert np.ptp([w for g, w in zip(groups, weights, strict=True) if g == group]) == 0


def test_a_volume_without_patches_is_never_drawn_and_a_group_without_any_is_refused() -> None:
    assert balanced_weights([("a",), ("a",), ("b",)], [0, 2, 1]).tolist() == [0, 0.25, 0.5]
    with pytest.raises(ValueError, match="'b' give no patches"):
        balanced_weights([("a",), ("b",)], [3, 0])


@pytest.mark.parametrize("queue_length", [8, 64])
def test_epochs_of_patches_are_balanced_though_volumes_give_different_numbers(queue_length: int) -> None:
    counts = [12] * 3 + [1] * 40 + [5] * 10
    classes = ["a"] * 3 + ["b"] * 40 + ["c"] * 10
    weights = balanced_weights([(name,) for name in classes], counts)
    sampler = EpochSampler(53, weights=weights.tolist(), counts=counts, fixed=True, seed=0)
    drawn: Counter[str] = Counter()
    for epoch in range(200):
        sampler.seed = epoch
        order = tuple(sampler)
        plan = EpochPlan(0, epoch, order, tuple(counts[v] for v in order), queue_length, draws=sampler.num_patches)
        assert sum(plan.counts) < sampler.num_patches + 12
        drawn.update(classes[order[draw.entry]] for draw in Draws(plan))
    assert sum(drawn.values()) == 200 * 126
    assert all(abs(count / drawn.total() - 1 / 3) < 0.015 for count in drawn.values()), drawn


@pytest.mark.parametrize("train_loader", ["queue", "plain"])
@pytest.mark.parametrize("by", ["class", "database", "both"])
def test_volumes_are_drawn_by_their_exact_chances(by: str, train_loader: str) -> None:
    load = Numbered(size=8)
    databases = [records(range(9), classes="aab"), records(range(9, 11), classes="b")]  # 6 × a, 3 × b; 2 × b
    chances = {
        "class": [1 / 12 if n < 9 and n % 3 != 2 else 1 / 10 for n in range(11)],
        "database": [1 / 18] * 9 + [1 / 4] * 2,
        "both": [1 / 24 if n % 3 != 2 else 1 / 12 for n in range(9)] + [1 / 4] * 2,
    }[by]
    module = make_module(
        [(samples, load) for samples in databases],
        train_transforms=crop(1),
        train_loader=train_loader,
        balance_sampler_by_class=by != "database",
        balance_sampler_by_database=by != "class",
        class_key="class",
        batch_size=11,
    )
    loader: Any = module.train_dataloader()
    drawn = [number for _ in range(60) for number in numbers(loader)]
    assert len(drawn) == 60 * 11
    assert p_value(np.bincount(drawn, minlength=11), np.asarray(chances)) > 1e-3


def test_validation_is_balanced_and_the_same_in_every_epoch() -> None:
    splits = {
        "train": [(records(range(4)), Numbered())],
        "validation": [(records(range(100), classes="a" * 9 + "b"), Numbered(size=8))],
        "monitor-train": [(records(range(4), classes="aaab"), Numbered(size=8))],
    }
    module = PatchDataModule(splits, balance_sampler_by_class=True, class_key="class", train_transforms=crop())
    loaders = module.val_dataloader()
    first, second = ([c for batch in loaders["validation"] for c in batch["class"]] for _ in range(2))
    assert first == second
    assert 30 < Counter(first)["b"] < 70
    assert len(loaders["monitor-train"]) == 4


def test_unshuffled_training_and_the_test_split_are_not_balanced() -> None:
    module = make_module(5, balance_sampler_by_class=True, class_key="class", train_transforms=crop(2))
    assert numbers(module.unshuffled_train_dataloader()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert numbers(module.test_dataloader()["test"]) == [100, 101, 102]
