# SPDX-License-Identifier: Apache-2.0
"""Drawing an index in proportion to weights."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["choose"]


def choose(cumulative: np.ndarray, uniform: Any) -> Any:
    """Indices drawn in proportion to the steps of ``cumulative``; an index without a step is never drawn.

    Args:
        cumulative: ascending cumulative weights, the last one positive.
        uniform: uniform numbers of [0, 1), an array or a single one.

    Returns:
        int64 indices in the shape of ``uniform``.

    >>> choose(np.array([0.0, 1.0, 1.0, 4.0, 4.0]), np.array([0.0, 0.2, 0.25, 0.999])).tolist()
    [1, 1, 3, 3]
    """
    total = cumulative[-1]
    # u * total may round up to total, which no step reaches; the last index with a step is then meant.
    last = np.searchsorted(cumulative, total, side="left")
    return np.minimum(np.searchsorted(cumulative, uniform * total, side="right"), last)
