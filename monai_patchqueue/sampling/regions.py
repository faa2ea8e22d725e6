# SPDX-License-Identifier: Apache-2.0
"""The voxels of each class inside a box, from the runs of a label or, for noisy labels, from counts per row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from math import prod
from typing import NamedTuple, Protocol

import numpy as np

from .geometry import Box
from .memory_order import blocks
from .recent import remember

__all__ = ["Read", "Region", "RowRegion", "RunRegion", "find_runs", "pieces"]

Read = Callable[[tuple[slice | int | np.ndarray, ...]], np.ndarray]
"""Gives the values of one layer of a label (the classes, or whether a channel is set) for an index in memory order."""
KEPT_CLASSES = 64
WORD = 8  # bytes that are skipped at once where nothing changes


class Runs(NamedTuple):
    """Stretches of equal values in a flat box: where each starts, and its value."""

    starts: np.ndarray
    values: np.ndarray


class Region(Protocol):
    """The classes inside a box and how many voxels each has there; draws voxels of a class."""

    classes: np.ndarray
    counts: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        ...

    def draw(self, which: np.ndarray, rng: np.random.RandomState, read: Read) -> np.ndarray:
        """One voxel, uniformly, of each class ``classes[which]``; int64 of shape [n, axes] in memory order."""
        ...


def pieces(read: Read, shape: tuple[int, ...], box: Box) -> Iterator[np.ndarray]:
    """The values of a box, some rows of its first axis at a time.

    Args:
        read: gives the label's values in memory order.
        shape: the label's shape, in memory order as all that follows.
        box: per axis the first voxel and the one after the last.
    """
    (low, high), *inner = box
    rest = tuple(slice(a, b) for a, b in inner)
    for piece in blocks(shape):
        first, stop = max(piece.start, low), min(piece.stop, high)
        if first < stop:
            yield read((slice(first, stop), *rest))


def find_runs(values: Iterable[np.ndarray], max_runs: int) -> Runs | None:
    """The runs of values that come in pieces, or None where there are more than ``max_runs``.

    >>> find_runs([np.array([[0, 0, 1], [1, 1, 0]]), np.array([[0, 0, 0]])], 99)
    Runs(starts=array([0, 2, 5]), values=array([0, 1, 0]))
    """
    starts, kept = [], []
    total = offset = 0
    before: np.ndarray | None = None
    for piece in values:
        flat = piece.reshape(-1)
        bits = _comparable(flat)
        changed = np.zeros(-(-flat.size // WORD) * WORD, dtype=bool)
        np.not_equal(bits[1:], bits[:-1], out=changed[1 : flat.size])
        changed[0] = before is None or bits[0] != before
        edges = _true_at(changed)
        total += edges.size
        if total > max_runs:
            return None
        starts.append(edges + offset)
        kept.append(flat[edges])
        before, offset = bits[-1], offset + flat.size
    return Runs(np.concatenate(starts), np.concatenate(kept))


def _true_at(mask: np.ndarray) -> np.ndarray:
    """Where a mask of whole words is true; faster than ``flatnonzero`` where that is seldom."""
    words = mask.view(np.uint64)
    some = np.flatnonzero(words != 0)
    within = np.flatnonzero(words[some].view(bool))
    places: np.ndarray = some[within // WORD] * WORD + within % WORD
    return places


def _comparable(flat: np.ndarray) -> np.ndarray:
    """Floats as integers: compared faster, and NaN equals itself."""
    return flat.view(f"u{flat.dtype.itemsize}") if flat.dtype.kind == "f" and flat.dtype.itemsize <= 8 else flat


class RunRegion:
    """A box of a label given by its runs.

    Voxels of the box are numbered in memory order. Each run covers one stretch of these numbers, so that counting and
    drawing need the runs' starts alone, never the voxels.

    Args:
        runs: runs of the box.
        box: per axis the first voxel and the one after the last, in memory order.
    """

    def __init__(self, runs: Runs, box: Box) -> None:
        self._first = np.array([a for a, _ in box], dtype=np.int64)
        self._size = tuple(b - a for a, b in box)
        short = np.uint32 if prod(self._size) <= np.iinfo(np.uint32).max else np.int64
        self._starts = np.append(runs.starts, prod(self._size)).astype(short)
        self.classes, self._which = _classes(runs.values)
        # Sums of integers in float64 are exact up to 2**53.
        found = np.bincount(self._which, weights=np.diff(self._starts), minlength=self.classes.size)
        self.counts: np.ndarray = found.astype(np.int64)

    @cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """The runs in the order of their classes, and how many voxels lie in those before each of them."""
        order = np.argsort(self._which, kind="stable")
        before = np.cumsum(np.diff(self._starts)[order], dtype=self._starts.dtype)
        return order.astype(self._starts.dtype), np.concatenate((before[:1] * 0, before))

    @property
    def nbytes(self) -> int:
        """See :class:`Region`; as much as it is once a voxel was drawn."""
        return 3 * self._starts.nbytes + self._which.nbytes

    def arrays(self) -> dict[str, np.ndarray]:
        """All that the region holds: for a file, out of which :meth:`of_arrays` takes it again."""
        box = np.array([self._first, self._size], dtype=np.int64)
        order, before = self._by_class
        runs = {"starts": self._starts, "which": self._which, "order": order, "before": before}
        return {"box": box, "classes": self.classes, "counts": self.counts, **runs}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> RunRegion:
        """The region that :meth:`arrays` was called of; they may be mapped files, of which drawing reads little."""
        region = cls.__new__(cls)
        region._first, region._size = arrays["box"][0], tuple(arrays["box"][1].tolist())
        region.classes, region.counts = arrays["classes"], arrays["counts"]
        region._starts, region._which = arrays["starts"], arrays["which"]
        region._by_class = arrays["order"], arrays["before"]
        return region

    def values(self, numbers: np.ndarray) -> np.ndarray:
        """The values of voxels of the box, by their numbers."""
        # In the dtype of what is searched, else that would be converted as a whole.
        run = np.searchsorted(self._starts, numbers.astype(self._starts.dtype), side="right") - 1
        values: np.ndarray = self.classes[self._which[run]]
        return values

    def draw(self, which: np.ndarray, rng: np.random.RandomState, read: Read) -> np.ndarray:
        """See :class:`Region`."""
        order, before = self._by_class
        number = np.append(0, np.cumsum(self.counts))[which] + rng.randint(0, self.counts[which], dtype=np.int64)
        place = np.searchsorted(before, number.astype(before.dtype), side="right") - 1
        rank = self._starts[order[place]] + (number - before[place])
        voxels: np.ndarray = np.array(np.unravel_index(rank, self._size)).T + self._first
        return voxels


def _classes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values that occur, ascending, and for each of ``values`` which one it is."""
    if values.dtype.kind in "ub" and values.dtype.itemsize <= 2:
        present = np.zeros(1 << 8 * values.dtype.itemsize, dtype=bool)
        present[values.astype(np.intp)] = True
        classes, which = np.flatnonzero(present).astype(values.dtype), (np.cumsum(present) - 1)[values.astype(np.intp)]
    else:
        classes, which = np.unique(values, return_inverse=True)
    return classes, which.astype(np.min_scalar_type(classes.size))


class RowRegion:
    """A box of a label that is too noisy for runs: classes are counted, and a class's rows when it is first drawn.

    Args:
        read: gives the label's values in memory order.
        shape: the label's shape, in memory order as all that follows.
        box: per axis the first voxel and the one after the last.
    """

    def __init__(self, read: Read, shape: tuple[int, ...], box: Box) -> None:
        self._shape, self._box = shape, box
        self._rows: dict[int, np.ndarray] = {}
        found: dict[float, int] = {}
        for values in pieces(read, shape, box):
            for value, count in _count(values):
                found[value] = found.get(value, 0) + count
        classes = sorted(value for value in found if value == value)  # NaN is no class
        self.classes: np.ndarray = np.array(classes, dtype=read((slice(0, 1),)).dtype)
        self.counts: np.ndarray = np.array([found[value] for value in classes], dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """See :class:`Region`."""
        return sum(before.nbytes for before in list(self._rows.values()))

    def draw(self, which: np.ndarray, rng: np.random.RandomState, read: Read) -> np.ndarray:
        """See :class:`Region`."""
        voxels = np.empty((which.size, len(self._box)), dtype=np.int64)
        outer = tuple(b - a for a, b in self._box[:-1])
        for i, number in enumerate(rng.randint(0, self.counts[which], dtype=np.int64)):
            before = self._counts_before(int(which[i]), read)
            row = int(np.searchsorted(before, number, side="right")) - 1
            voxels[i, :-1] = np.unravel_index(row, outer) if outer else ()
            index = tuple(int(v) + a for v, (a, _) in zip(voxels[i, :-1], self._box[:-1], strict=True))
            members = np.flatnonzero(read((*index, slice(*self._box[-1]))) == self.classes[which[i]])
            voxels[i, -1] = members[number - before[row]]
        voxels += np.array([a for a, _ in self._box], dtype=np.int64)
        return voxels

    def _counts_before(self, which: int, read: Read) -> np.ndarray:
        """Voxels of the class before each row of the box; kept for the classes drawn of late."""
        known = self._rows.get(which)
        if known is not None:
            return known
        value = self.classes[which]
        counts = np.concatenate([(v == value).sum(axis=-1).reshape(-1) for v in pieces(read, self._shape, self._box)])
        before = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)))
        return remember(self._rows, which, before, KEPT_CLASSES)


def _count(values: np.ndarray) -> Iterator[tuple[float, int]]:
    """Each value and how often it occurs."""
    if values.dtype.kind in "iub" and values.size:
        integers = values.astype(np.int64)
        low = int(integers.min())
        if int(integers.max()) - low < 1 << 16:
            counts = np.bincount((integers - low).reshape(-1))
            for value in np.flatnonzero(counts).tolist():
                yield value + low, int(counts[value])
            return
    classes, counts = np.unique(values, return_counts=True)
    yield from zip(classes.tolist(), counts.tolist(), strict=True)
