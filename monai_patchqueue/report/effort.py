# SPDX-License-Identifier: Apache-2.0
"""Work that is to take no more than a share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

__all__ = ["Effort"]

# Seconds that are given in advance, and that are saved up at most.
_CREDIT = 0.005


class Effort:
    """Lets work be done as long as it takes no more than a share of the time.

    Whether it is done depends on what work took before, and not on the work itself: what is learned from the work that
    is done holds for the other too.

    Args:
        share: of the time, above 0 and at most 1.

    Raises:
        ValueError: another share.

    Example:
        >>> done = []
        >>> effort = Effort(0.001)
        >>> for number in range(1000):
        ...     effort.spend(lambda: (done.append(number), time.sleep(0.01)))
        >>> 1 <= len(done) < 1000
        True
    """

    def __init__(self, share: float) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"effort={share}: expected a share of the time, above 0 and at most 1.")
        self._share = share
        self._credit = _CREDIT
        self._before = time.perf_counter()

    def spend(self, work: Callable[..., Any], *args: Any) -> None:
        """Call ``work``, if it is time for that."""
        now = time.perf_counter()
        self._credit = min(self._credit + self._share * (now - self._before), _CREDIT)
        self._before = now
        if self._credit > 0:
            work(*args)
            self._credit -= time.perf_counter() - now
