# SPDX-License-Identifier: Apache-2.0
"""Drawing voxels of given classes by trial, without knowing where the classes lie.

Of voxels drawn uniformly from a box, those that belong to a class are drawn uniformly from that class. So some hundred
looks at a label do what an index of all its voxels would, for classes that are not rare. Whether they are enough
depends on the classes that are seen, and not on where in its class a voxel lies: what is drawn is uniform, and so is
what is drawn by other means after giving up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["Member", "try_voxels"]

Member = Callable[[np.ndarray], np.ndarray]
"""Says of each value whether it belongs to a class."""
TRIALS = (32, 128, 512)
"""Looks for each voxel to draw; the next number where the one before did not do."""
ENOUGH = 512
"""Looks after which a class that was not met is taken for rare."""
SHARE = 16
"""No more than one voxel in so many is looked at."""


def try_voxels(
    look: Callable[[np.ndarray], np.ndarray], voxels: int, members: Sequence[Member], n: int, rng: np.random.RandomState
) -> list[np.ndarray] | None:
    """``n`` uniformly drawn voxels of each class; None where so many were not met.

    Args:
        look: gives the values of voxels of the box by their numbers.
        voxels: how many the box has.
        members: one for each class; classes do not overlap.
        n: how many voxels to draw.
        rng: where the randomness comes from.

    Returns:
        Numbers of voxels, int64 of shape [n] for each class; no voxel comes from the same look as another one.

    >>> box = np.repeat([0, 1, 2], 4000)
    >>> members = [lambda values: values == 1, lambda values: values == 2]
    >>> ones, twos = try_voxels(box.take, box.size, members, 3, np.random.RandomState(0))
    >>> box[ones], box[twos]
    (array([1, 1, 1]), array([2, 2, 2]))
    """
    for trials in TRIALS:
        if SHARE * trials * n > voxels:
            break
        numbers = rng.randint(0, voxels, trials * n, dtype=np.int64)
        values = look(numbers)
        found: list[np.ndarray] = []
        for member in members:
            hits = np.flatnonzero(member(values))[:n]
            if not hits.size and trials * n >= ENOUGH:
                return None
            if hits.size < n:
                break
            found.append(numbers[hits])
        else:
            return found
    return None
