# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import numpy as np
import pytest

from monai_patchqueue.io.layout import laid_out

NUMBERS = np.arange(37 * 19 * 33, dtype=np.int32).reshape(37, 19, 33)


@pytest.mark.parametrize("source", [*itertools.permutations(range(3))])
@pytest.mark.parametrize("target", [*itertools.permutations(range(3))])
def test_numbers_keep_their_places_in_any_order(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    array = np.ascontiguousarray(NUMBERS.transpose(source)).transpose(np.argsort(source))
    strides = np.argsort(target)[::-1].tolist()
    for turned in (array, array[::-1], array[:, ::-1, ::-2], array[3:30, None], array[:, 2:3]):
        wanted = strides if turned.ndim == 3 else [strides[0], 0, *strides[1:]]
        result = laid_out(turned, wanted)
        np.testing.assert_array_equal(result, turned)
        long = [axis for axis in range(turned.ndim) if turned.shape[axis] > 1]
        assert min(result.strides[axis] for axis in long) > 0
        by_memory, by_wish = (sorted(long, key=lambda axis: of[axis]) for of in (result.strides, wanted))
        assert by_memory == by_wish


def test_what_lies_so_already_is_not_copied() -> None:
    assert laid_out(NUMBERS.T, (1, 2, 3)).base is NUMBERS.base
    assert laid_out(NUMBERS[None, 3:9], (0, 9, 2, 1)).base is NUMBERS.base
