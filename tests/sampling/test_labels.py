# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from monai_patchqueue.sampling import LabelIndex, LabelRule, PatchGeometry
from monai_patchqueue.sampling.regions import find_runs
from tests.sampling.chi_square import frequencies, in_box, p_value
from tests.volumes import blobs

CASES = [
    ((7, 9), (3, 4)),
    ((6, 8), (6, 8)),
    ((5, 6, 7), (2, 3, 4)),
    ((5, 6, 4), (5, 2, 3)),
    ((23,), (6,)),
    ((3, 4, 3, 5), (2, 2, 1, 3)),
]
RUNS, ROWS = None, 0
"""As many runs as by default, or none, so that rows are counted."""


def expected(label: np.ndarray, box: Any, rule: LabelRule) -> np.ndarray:
    """Exact probabilities of the voxels, by the rule's words and brute force."""
    legal = in_box(box, label.shape[1:])
    if len(label) == 1:
        members = {int(c): (label[0] == c) & legal for c in np.unique(label)}
        positive = (label[0] > 0) & legal
        ignored = label[0] == rule.ignore if rule.ignore is not None else np.zeros_like(legal)
    else:
        members = {c: (label[c] > 0) & legal for c in range(len(label))}
        positive = (label > 0).any(0) & legal
        ignored = label[rule.ignore] > 0 if rule.ignore is not None else np.zeros_like(legal)
    if rule.classes == "positive":
        return (positive & ~ignored).astype(float)
    if rule.classes == "any":
        return (legal & ~ignored).astype(float)
    p = rule.classes if isinstance(rule.classes, Mapping) else {c: 1 for c in members if c > 0 or len(label) > 1}
    result = np.zeros(legal.shape)
    for c, member in members.items():
        mask = member & ~ignored
        if mask.any():
            result += p.get(c, 0) * mask / mask.sum()
    return result


def labels(shape: tuple[int, ...], channels: int, dtype: Any) -> np.ndarray:
    rng = np.random.default_rng(5)
    if channels > 1:
        return (rng.random((channels, *shape)) < 0.4).astype(dtype)
    return rng.choice([0, 1, 2, 7], size=(1, *shape), p=[0.6, 0.2, 0.15, 0.05]).astype(dtype)


@pytest.mark.parametrize("max_runs", [RUNS, ROWS], ids=["runs", "rows"])
@pytest.mark.parametrize("border", ["inside", "clamp", "pad"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("shape", "size"), CASES)
def test_voxels_are_drawn_with_the_exact_probabilities_of_each_rule(
    shape: tuple[int, ...], size: tuple[int, ...], channels: int, border: str, max_runs: int | None
) -> None:
    label = labels(shape, channels, np.uint8)
    geometry = PatchGeometry(shape, size, border)
    index = LabelIndex(label, max_runs)
    for ignore in (None, 2):
        for classes in ("positive", "balanced", "any", {0: 1, 1: 2.5, 2: 0.5, 7: 1, 99: 4}, {1: 1}):
            rule = LabelRule(classes, ignore)
            p = expected(label, geometry.box, rule)
            drawn = index.draw(label, geometry.box, rule, 1500 if max_runs is RUNS else 400, np.random.RandomState(1))
            if drawn is None:
                assert p.sum() == 0
            else:
                assert p_value(frequencies(drawn, shape), p) > 1e-4, (rule, ignore)


@pytest.mark.parametrize("max_runs", [RUNS, ROWS], ids=["runs", "rows"])
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int16, np.int64, np.float32, np.float64, ">i2"])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (2, 0, 1)])
def test_any_dtype_and_memory_order_gives_the_drawn_class(
    axes: tuple[int, ...], dtype: Any, max_runs: int | None
) -> None:
    label = labels((6, 5, 7), 1, dtype)
    laid_out = np.ascontiguousarray(label[0].transpose(axes)).transpose(np.argsort(axes))[None]
    geometry = PatchGeometry((6, 5, 7), (2, 3, 2))
    for c in (0, 1):
        drawn = LabelIndex(laid_out, max_runs).draw(
            laid_out, geometry.box, LabelRule({c: 1}), 40, np.random.RandomState(0)
        )
        assert drawn is not None
        assert (label[0][tuple(drawn.T)] == c).all()
        assert in_box(geometry.box, (6, 5, 7))[tuple(drawn.T)].all()


@pytest.mark.parametrize("max_runs", [RUNS, ROWS], ids=["runs", "rows"])
def test_a_view_with_gaps_and_backward_axes_is_read_as_it_looks(max_runs: int | None) -> None:
    label = labels((12, 10, 14), 1, np.uint8)[:, ::2, ::-1, 1::3]
    index = LabelIndex(label, max_runs)
    box = PatchGeometry(label.shape[1:], (1, 1, 1)).box
    assert index.counts(label, box) == {int(c): int((label == c).sum()) for c in np.unique(label)}
    drawn = index.draw(label, box, LabelRule({7: 1}), 50, np.random.RandomState(0))
    assert drawn is not None
    assert (label[0][tuple(drawn.T)] == 7).all()


def test_each_value_of_an_instance_map_is_equally_likely_however_large_it_is() -> None:
    label = np.zeros((1, 40, 40), dtype=np.int32)
    label[0, 0:20, 0:20] = 70_000
    label[0, 30, 30] = 12
    label[0, 35:37, 5] = 900
    drawn = LabelIndex(label).draw(label, ((0, 40), (0, 40)), LabelRule("balanced"), 3000, np.random.RandomState(0))
    assert drawn is not None
    values, counts = np.unique(label[0][tuple(drawn.T)], return_counts=True)
    assert values.tolist() == [12, 900, 70_000]
    assert p_value(counts, np.ones(3)) > 1e-3


def test_balancing_a_map_of_fractions_is_refused() -> None:
    label = np.array([[[0, 0.5, 1]]], dtype=np.float32)
    with pytest.raises(ValueError, match=r"whole numbers, and the label holds 0\.5"):
        LabelIndex(label).draw(label, ((0, 1), (0, 3)), LabelRule("balanced"), 1, np.random.RandomState(0))


@pytest.mark.parametrize("max_runs", [RUNS, ROWS], ids=["runs", "rows"])
def test_nan_belongs_to_no_class(max_runs: int | None) -> None:
    label = np.array([[[np.nan, np.nan, 1, np.nan]]], dtype=np.float32)
    for classes in ("positive", "balanced", {1: 1}):
        drawn = LabelIndex(label, max_runs).draw(
            label, ((0, 1), (0, 4)), LabelRule(classes), 9, np.random.RandomState(0)
        )
        assert drawn is not None
        assert (drawn == [0, 2]).all()


def test_counts_are_those_inside_the_legal_centers() -> None:
    label = blobs(20, 18, 22)
    box = PatchGeometry((20, 18, 22), (7, 6, 9)).box
    legal = label[0][tuple(slice(a, b) for a, b in box)]
    for max_runs in (RUNS, ROWS):
        assert LabelIndex(label, max_runs).counts(label, box) == {
            int(c): int((legal == c).sum()) for c in np.unique(legal)
        }


def test_a_noisy_label_is_not_indexed_voxel_by_voxel() -> None:
    label = np.random.default_rng(0).integers(0, 4, (1, 128, 128, 64)).astype(np.uint8)
    index = LabelIndex(label)
    box = PatchGeometry((128, 128, 64), (32, 32, 32)).box
    drawn = index.draw(label, box, LabelRule("balanced"), 100, np.random.RandomState(0))
    assert drawn is not None
    assert set(label[0][tuple(drawn.T)].tolist()) == {1, 2, 3}
    assert 0 < index.nbytes < label.nbytes / 2


def test_an_index_of_runs_is_small() -> None:
    label = blobs(128, 128, 64)
    index = LabelIndex(label)
    index.draw(label, ((0, 128), (0, 128), (0, 64)), LabelRule("balanced"), 1, np.random.RandomState(0))
    assert 0 < index.nbytes < label.nbytes / 4


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int16, np.uint16, np.float32, np.float64, ">i4"])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 1001])
def test_runs_are_found_wherever_values_change(size: int, dtype: Any) -> None:
    rng = np.random.default_rng(size)
    flat = np.repeat(rng.integers(0, 3, size), rng.integers(1, 30, size))[:size].astype(dtype)
    runs = find_runs(np.array_split(flat, [size // 3, size // 2]) if size > 3 else [flat], size)
    assert runs is not None
    edges = [0, *(i for i in range(1, size) if flat[i] != flat[i - 1])]
    assert runs.starts.tolist() == edges
    assert runs.values.tolist() == flat[edges].tolist()
    assert find_runs([flat], len(edges) - 1) is None


def test_nothing_is_drawn_from_a_class_that_is_only_outside_the_legal_centers() -> None:
    label = np.zeros((1, 9, 9), dtype=np.uint8)
    label[0, 0, 0], label[0, 4, 4] = 1, 2
    index = LabelIndex(label)
    box = PatchGeometry((9, 9), (5, 5)).box
    assert index.draw(label, box, LabelRule({1: 1}), 1, np.random.RandomState(0)) is None
    drawn = index.draw(label, box, LabelRule({1: 5, 2: 1}), 9, np.random.RandomState(0))
    assert drawn is not None
    assert (drawn == [4, 4]).all()
