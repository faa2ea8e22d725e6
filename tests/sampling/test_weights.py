# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import RandWeightedCrop

from monai_patchqueue.sampling import PatchGeometry, WeightIndex, as_array
from tests.sampling.chi_square import frequencies, in_box, p_value

PUBLISHED = np.array([[0, 0, 1, 1, 5, 2, 1, 1, 0], [2] * 9], dtype=np.float32)
"""The map of the example in the documentation of MONAI's RandWeightedCrop tests, one weight a column."""

CASES = [
    ((7, 9), (3, 4)),
    ((7, 9), (7, 9)),
    ((6, 8), (2, 5)),
    ((5, 6, 7), (2, 3, 4)),
    ((5, 6, 4), (5, 2, 4)),
    ((4, 5, 6), (4, 5, 6)),
    ((23,), (6,)),
    ((3, 4, 3, 5), (2, 2, 1, 3)),
]


def draw(weights: np.ndarray, geometry: PatchGeometry, n: int, seed: int = 0) -> np.ndarray:
    drawn = WeightIndex(weights).draw(weights, geometry.box, n, np.random.RandomState(seed))
    assert drawn is not None
    return drawn


@pytest.mark.parametrize("border", ["inside", "clamp", "pad"])
@pytest.mark.parametrize(("shape", "size"), CASES)
def test_voxels_are_drawn_in_proportion_to_their_weights(
    shape: tuple[int, ...], size: tuple[int, ...], border: str
) -> None:
    rng = np.random.default_rng(1)
    weights = (rng.random(shape) * (rng.random(shape) < 0.7)).astype(np.float32)
    weights[tuple(s // 2 for s in size)] = 0.4  # the first legal center
    weights[tuple(n - s + s // 2 for n, s in zip(shape, size, strict=True))] = 0.3  # the last one
    geometry = PatchGeometry(shape, size, border)
    observed = frequencies(draw(weights, geometry, 5000), shape)
    assert p_value(observed, weights * in_box(geometry.box, shape)) > 1e-3
    assert observed[tuple(s // 2 for s in size)]
    assert observed[tuple(n - s + s // 2 for n, s in zip(shape, size, strict=True))]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float16, np.float32, np.float64, np.bool_, ">f4"])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_any_dtype_and_memory_order_gives_the_same_frequencies(dtype: type, axes: tuple[int, ...]) -> None:
    weights = np.random.default_rng(2).integers(0, 4, (5, 4, 6))
    laid_out = np.ascontiguousarray(weights.transpose(axes)).transpose(np.argsort(axes)).astype(dtype, order="K")
    geometry = PatchGeometry((5, 4, 6), (2, 3, 2))
    expected = laid_out.astype(np.float64) * in_box(geometry.box, (5, 4, 6))
    assert p_value(frequencies(draw(laid_out, geometry, 3000), (5, 4, 6)), expected) > 1e-3


def test_the_published_example_gives_the_published_proportions() -> None:
    geometry = PatchGeometry((2, 9), (1, 1))
    observed = frequencies(draw(PUBLISHED, geometry, 100_000), (2, 9))
    assert p_value(observed, PUBLISHED) > 1e-3
    assert (observed[PUBLISHED == 0] == 0).all()


def test_monais_weighted_crop_fails_the_same_test_because_it_never_draws_the_last_start() -> None:
    crop = RandWeightedCrop((1, 1), num_samples=20_000).set_random_state(0)
    crop.randomize(torch.from_numpy(PUBLISHED)[None])
    observed = frequencies(np.array(crop.centers).astype(int), (2, 9))
    assert p_value(observed, PUBLISHED) < 1e-12
    assert observed[1].sum() == 0 or observed[:, -1].sum() == 0


def test_a_long_row_is_summed_in_parts_and_drawn_exactly() -> None:
    weights = np.random.default_rng(3).integers(0, 3, (2, 1300)).astype(np.float32)
    geometry = PatchGeometry((2, 1300), (1, 8))
    coarse = frequencies(draw(weights, geometry, 8000), (2, 1300)).reshape(2, 130, 10).sum(-1)
    expected = (weights * in_box(geometry.box, (2, 1300))).reshape(2, 130, 10).sum(-1)
    assert p_value(coarse, expected) > 1e-3


@pytest.mark.parametrize("library", [np, torch])
def test_every_third_of_a_large_flat_map_is_drawn_equally_often(library: Any) -> None:
    shape = (512, 512, 300)  # a float32 cumulative sum stops growing at a fifth of it
    weights = as_array(library.ones(shape, dtype=library.float32))
    drawn = draw(weights, PatchGeometry(shape, (64, 64, 64), "clamp"), 6000)
    for axis, n in enumerate(shape):
        thirds = np.bincount(drawn[:, axis] * 3 // n, minlength=3)
        assert p_value(thirds, np.array([np.sum(np.arange(n) * 3 // n == i) for i in range(3)], dtype=float)) > 1e-3
    assert len({tuple(v) for v in drawn.tolist()}) > 5990


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [(0, 0, 0), (4, 3, 2), (8, 8, 8)])
def test_negative_nan_and_infinite_weights_are_refused_wherever_they_are(
    dtype: type, bad: float, where: tuple[int, ...]
) -> None:
    weights = np.ones((9, 9, 9), dtype=dtype)
    weights[where] = bad
    with pytest.raises(ValueError, match="negative" if bad == -1 else "NaN or infinite"):
        draw(weights, PatchGeometry((9, 9, 9), (3, 3, 3)), 1)


def test_a_negative_integer_is_refused_and_a_negative_zero_is_zero() -> None:
    with pytest.raises(ValueError, match="negative values, down to -2"):
        draw(np.array([[1, -2]]), PatchGeometry((1, 2), (1, 1)), 1)
    assert draw(np.array([[-0.0, 3]]), PatchGeometry((1, 2), (1, 1)), 3).tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("scale", [1e-30, 1, 3e38])
def test_weights_count_in_proportion_at_any_scale_and_are_left_as_they_are(scale: float) -> None:
    weights = np.float32(scale) * np.array([[1, 0.5, 0, 0.25]] * 3, dtype=np.float32)
    before = weights.copy()
    observed = frequencies(draw(weights, PatchGeometry((3, 4), (1, 1)), 3000), (3, 4))
    assert p_value(observed, before.astype(np.float64) / scale) > 1e-3
    assert (weights == before).all()


def test_a_map_without_weight_among_the_legal_centers_gives_none() -> None:
    weights = np.zeros((6, 6), dtype=np.float32)
    weights[0, 0] = 1
    index = WeightIndex(weights)
    assert index.draw(weights, PatchGeometry((6, 6), (4, 4)).box, 1, np.random.RandomState(0)) is None
    assert index.draw(weights, PatchGeometry((6, 6), (4, 4), "pad").box, 1, np.random.RandomState(0)) is not None


def test_one_index_serves_patches_of_many_sizes() -> None:
    weights = np.random.default_rng(4).random((6, 7)).astype(np.float32)
    index = WeightIndex(weights)
    for size in [(1, 1), (2, 3), (6, 7), (4, 1), (3, 3), (5, 5), (1, 1)]:
        box = PatchGeometry((6, 7), size).box
        drawn = index.draw(weights, box, 2000, np.random.RandomState(0))
        assert drawn is not None
        assert p_value(frequencies(drawn, (6, 7)), weights * in_box(box, (6, 7))) > 1e-3
