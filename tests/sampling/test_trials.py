# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from monai_patchqueue.sampling import LabelIndex, LabelRule, PatchGeometry
from tests.sampling.chi_square import in_box, p_value
from tests.sampling.test_labels import expected

SHAPE = (150, 140)
BOX = PatchGeometry(SHAPE, (9, 6)).box
CELLS = np.arange(SHAPE[0])[:, None] // 10 * 14 + np.arange(SHAPE[1]) // 10


def label_of(shares: dict[int, float]) -> np.ndarray:
    """A label of which each class has a share of the legal centers, and class 9 the rest."""
    legal = in_box(BOX, SHAPE)
    bounds = np.cumsum([0, *shares.values()]) * legal.sum()
    label = np.full((1, *SHAPE), 9, dtype=np.uint8)
    for class_, first, stop in zip(shares, bounds[:-1], bounds[1:], strict=True):
        label[0].reshape(-1)[np.flatnonzero(legal)[round(first) : round(stop)]] = class_
    return label


def draws(label: np.ndarray, rule: LabelRule, n: int, times: int) -> tuple[np.ndarray, list[bool]]:
    """Voxels of shape [times, n, axes], drawn with a new index each time; and whether it had to find the runs."""
    rng = np.random.RandomState(0)
    voxels, indexed = np.empty((times, n, 2), dtype=np.int64), []
    for time in range(times):
        index = LabelIndex(label)
        voxels[time] = index.draw(label, BOX, rule, n, rng)
        indexed.append(index.nbytes > 0)
    return voxels, indexed


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("ignore", [None, 2])
@pytest.mark.parametrize("classes", ["positive", "any", {0: 1, 2: 3}, {1: 1, 2: 0}])
def test_what_is_drawn_by_trial_has_the_exact_probabilities(classes: object, ignore: int | None, n: int) -> None:
    label = label_of({0: 0.3, 1: 0.4, 2: 0.2})
    rule = LabelRule(classes, ignore)  # type: ignore[arg-type]
    voxels, indexed = draws(label, rule, n, 1600 // n)
    assert not any(indexed)
    kinds = CELLS * 10 + label[0]
    probabilities = np.bincount(kinds.reshape(-1), weights=expected(label, BOX, rule).reshape(-1))
    found = np.bincount(kinds[tuple(voxels.reshape(-1, 2).T)], minlength=probabilities.size)
    assert p_value(found, probabilities) > 1e-3


def test_classes_and_voxels_are_as_likely_whether_or_not_trials_are_enough() -> None:
    label = label_of({1: 0.002, 2: 0.4})
    voxels, indexed = draws(label, LabelRule({1: 1, 2: 1}), 2, 1500)
    assert 0.2 < np.mean(indexed) < 0.8
    rare = label[0][tuple(voxels.reshape(-1, 2).T)].reshape(-1, 2) == 1
    assert p_value(np.bincount(rare.sum(axis=1), minlength=3), np.array([1.0, 2, 1])) > 1e-3
    numbers = np.ravel_multi_index(tuple(voxels[rare].T), SHAPE)
    places = np.flatnonzero(label[0] == 1)
    assert p_value(np.array([(numbers == place).sum() for place in places]), np.ones(places.size)) > 1e-3


def test_voxels_of_overlapping_channels_are_drawn_independently() -> None:
    first = label_of({1: 0.02})[0] == 1
    label = np.stack((first, label_of({1: 0.04})[0] == 1, ~first))
    voxels, indexed = draws(label, LabelRule({0: 1, 1: 1}), 2, 1500)
    assert not any(indexed)
    p = expected(label, BOX, LabelRule({0: 1, 1: 1}))
    same = (voxels[:, 0] == voxels[:, 1]).all(axis=1).sum()
    chance = ((p / p.sum()) ** 2).sum()
    assert p_value(np.array([same, len(voxels) - same]), np.array([chance, 1 - chance])) > 1e-3


def test_nothing_is_read_of_a_label_in_memory_but_what_is_looked_at() -> None:
    class Counted(np.ndarray):
        read = 0

        def __getitem__(self, index: object) -> object:
            part = super().__getitem__(index)
            if isinstance(index, tuple) and isinstance(index[0], np.ndarray):
                Counted.read += part.size
            return part

    label = label_of({1: 0.5}).view(Counted)
    index = LabelIndex(label)
    assert index.draw(label, BOX, LabelRule({1: 1}), 2, np.random.RandomState(0)) is not None
    assert 0 < Counted.read < label.size / 16
    assert index.nbytes == 0
