# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monai_patchqueue.sampling import (
    PatchGeometry,
    PatchGrid,
    axis_starts,
    overlap_voxels,
    resolve_size,
)

lengths = st.integers(1, 12)


@given(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=4))
def test_inside_knows_every_start_and_only_those(axes: list[tuple[int, int]]) -> None:
    shape, size = zip(*((max(n, s), s) for n, s in axes), strict=True)
    geometry = PatchGeometry(shape, size)
    for (low, high), n, s in zip(geometry.box, shape, size, strict=True):
        assert [c - s // 2 for c in range(low, high)] == list(range(n - s + 1))


@given(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=4), st.sampled_from(["inside", "clamp", "pad"]))
def test_drawn_centers_lie_in_the_volume_and_unless_clamped_in_the_middle_of_their_patch(
    axes: list[tuple[int, int]], border: str
) -> None:
    shape, size = zip(*axes, strict=True)
    geometry = PatchGeometry(shape, size, border)
    drawn = geometry.draw_uniform(20, np.random.RandomState(0))
    assert (drawn >= 0).all()
    assert (drawn < np.array(shape)).all()
    starts = geometry.starts(drawn)
    if border != "clamp":
        assert (starts + geometry.half == drawn).all()
    if border != "pad" and geometry.fits:
        assert not geometry.overhangs(starts)


@pytest.mark.parametrize(("n", "s"), [(1, 4), (2, 4), (3, 4), (1, 3), (2, 3), (2, 5), (1, 2)])
def test_a_volume_smaller_than_the_patch_lies_in_its_middle_with_the_center_in_the_volume(n: int, s: int) -> None:
    for border in ("inside", "clamp"):
        geometry = PatchGeometry((n,), (s,), border)
        starts = geometry.starts(geometry.draw_uniform(50, np.random.RandomState(0)))
        assert len(set(starts[:, 0])) == 1
        before, after = -starts[0, 0], starts[0, 0] + s - n
        assert 0 <= before - after <= 1
        assert 0 <= starts[0, 0] + s // 2 < n


def test_clamp_lets_every_voxel_be_chosen_and_moves_the_patch_inside() -> None:
    geometry = PatchGeometry((6,), (4,), "clamp")
    assert geometry.box == ((0, 6),)
    assert geometry.starts(np.arange(6)[:, None])[:, 0].tolist() == [0, 0, 0, 1, 2, 2]


def test_an_int_is_the_size_along_every_axis_and_minus_one_the_whole_axis() -> None:
    assert resolve_size(5, (8, 9, 10)) == (5, 5, 5)
    assert resolve_size((5, -1), (8, 9)) == (5, 9)
    with pytest.raises(ValueError, match="3 spatial axes, but the volume has 2"):
        resolve_size((5, 5, 5), (8, 9))


@given(lengths, lengths, st.integers(0, 11))
def test_a_grid_covers_each_axis_without_gap_and_ends_at_the_border(n: int, s: int, overlap: int) -> None:
    if s > n or overlap >= s:
        return
    starts = axis_starts(n, s, overlap)
    assert starts[0] == 0
    assert starts[-1] == n - s
    assert all(0 < b - a <= s - overlap for a, b in pairwise(starts))


def test_a_grid_counts_what_it_gives_and_runs_through_the_last_axis_first() -> None:
    grid = PatchGrid((10, 7), (4, 3), (1, 0))
    starts = grid.starts
    assert len(starts) == grid.count
    assert [grid.start(patch) for patch in range(grid.count)] == [tuple(start) for start in starts.tolist()]
    assert starts.tolist() == sorted(starts.tolist())
    assert len({tuple(s) for s in starts.tolist()}) == len(starts)


@given(st.lists(st.tuples(lengths, lengths, st.integers(0, 11)), min_size=1, max_size=3), st.booleans())
def test_the_cells_of_a_grids_patches_fill_the_volume_once_and_lie_in_their_patches(
    axes: list[tuple[int, int, int]], pad_overlap: bool
) -> None:
    shape, size, overlap = zip(*((n, s, min(o, s - 1)) for n, s, o in axes), strict=True)
    grid = PatchGrid(shape, size, overlap, pad_overlap)
    covered = np.zeros(shape, int)
    for patch in range(grid.count):
        cell = grid.cell(patch)
        assert all(a <= c and d <= b for (c, d), (a, b) in zip(cell, grid.inside(patch), strict=True))
        covered[tuple(slice(a, b) for a, b in cell)] += 1
    assert (covered == 1).all()


def test_a_padded_grid_begins_and_ends_half_an_overlap_outside() -> None:
    assert axis_starts(10, 4, 2, pad=1) == [-1, 1, 3, 5, 7]
    assert axis_starts(3, 8, 2, pad=1) == [-3]
    assert axis_starts(3, 5, 2, pad=1) == [-1]


@pytest.mark.parametrize(
    ("overlap", "size", "voxels"), [(0.5, (4, 5), (2, 3)), (2, (4, 5), (2, 2)), ((0.25, 1), (8, 4), (2, 1))]
)
def test_a_float_overlap_is_a_fraction_as_in_monais_sliding_window(
    overlap: float | tuple[float, ...], size: tuple[int, ...], voxels: tuple[int, ...]
) -> None:
    assert overlap_voxels(overlap, size) == voxels
    if isinstance(overlap, float):
        assert tuple(s - round(s - s * overlap) for s in size) == voxels


def test_an_overlap_as_large_as_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="must be smaller than the patch"):
        overlap_voxels(4, (4, 8))
