# SPDX-License-Identifier: Apache-2.0
"""Figures over time in memory that does not grow: when it is full, neighbours are merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["Histogram", "History"]

_MERGE: dict[str, Callable[[float, float], float]] = {
    "sum": lambda a, b: a + b,
    "max": max,
    "last": lambda a, b: b,
}


class History:
    """Figures of each step, in at most ``bins`` bins of equally many steps.

    Args:
        columns: the figures' names, with what becomes of several values: ``"sum"``, ``"max"`` or ``"last"``.
        bins: an even number.

    Example:
        >>> history = History({"wait": "sum", "longest": "max"}, bins=4)
        >>> for wait in (1.0, 2.0, 3.0, 4.0, 5.0):
        ...     history.add(wait=wait, longest=wait)
        >>> history["steps"].tolist(), history["wait"].tolist(), history["longest"].tolist()
        ([2.0, 2.0, 1.0], [3.0, 7.0, 5.0], [2.0, 4.0, 5.0])
    """

    def __init__(self, columns: Mapping[str, str], bins: int = 512) -> None:
        self._how = {"steps": _MERGE["sum"], **{name: _MERGE[how] for name, how in columns.items()}}
        self._bins = bins
        self._width = 1
        self._values: dict[str, list[float]] = {name: [] for name in self._how}

    def add(self, **figures: float) -> None:
        """Take note of a step."""
        steps = self._values["steps"]
        row = {"steps": 1.0, **figures}
        if steps and steps[-1] < self._width:
            for name, merge in self._how.items():
                column = self._values[name]
                column[-1] = merge(column[-1], row[name])
            return
        if len(steps) == self._bins:
            self._coarsen()
        for name, column in self._values.items():
            column.append(row[name])

    def _coarsen(self) -> None:
        self._width *= 2
        for name, merge in self._how.items():
            column = self._values[name]
            self._values[name] = [merge(a, b) for a, b in zip(column[::2], column[1::2], strict=True)]

    def __len__(self) -> int:
        return len(self._values["steps"])

    def __getitem__(self, column: str) -> np.ndarray[Any, Any]:
        return np.asarray(self._values[column], float)

    def mean(self, column: str) -> np.ndarray[Any, Any]:
        """A summed column's mean over the steps of each bin."""
        mean: np.ndarray[Any, Any] = self[column] / self["steps"]
        return mean

    def state_dict(self) -> dict[str, Any]:
        """The bins, as plain values."""
        return {"width": self._width, "values": {name: list(column) for name, column in self._values.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the bins of ``state``."""
        self._width = state["width"]
        self._values = {name: list(state["values"][name]) for name in self._how}


class Histogram:
    """How often times of each length occurred, in bins of equal width on a logarithmic axis.

    Args:
        least: upper end of the first bin, in seconds.
        decades: powers of ten from there to the lower end of the last bin.
        per_decade: bins in each.

    Example:
        >>> waits = Histogram()
        >>> for seconds in (0.0, 0.002, 0.002, 50.0):
        ...     waits.add(seconds)
        >>> waits.counts.sum().item(), waits.counts.max().item()
        (4, 2)
    """

    def __init__(self, least: float = 1e-5, decades: int = 8, per_decade: int = 8) -> None:
        self._least = least
        self._per_decade = per_decade
        self.counts = np.zeros(decades * per_decade + 2, np.int64)

    def add(self, seconds: float) -> None:
        """Count a time."""
        place = 0
        if seconds >= self._least:
            place = min(1 + int(math.log10(seconds / self._least) * self._per_decade), len(self.counts) - 1)
        self.counts[place] += 1

    @property
    def edges(self) -> np.ndarray[Any, Any]:
        """Where bins begin and end, in seconds: one more than there are bins."""
        edges: np.ndarray[Any, Any] = self._least * 10 ** (np.arange(-1, len(self.counts)) / self._per_decade)
        return edges
