# SPDX-License-Identifier: Apache-2.0
"""The voxels of each class inside a box, from the runs of a label or, for noisy labels, from counts per row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import NamedTuple, Protocol

import numpy as np

from .geometry import Box
from .memory_order import blocks
from .recent import remember

__all__ = ["Read", "Region", "RowRegion", "RunRegion", "Runs", "find_runs"]

Read = Callable[[tuple[slice | int, ...]], np.ndarray]
"""Gives the values of one layer of a label (the classes, or whether a channel is set) for an index in memory order."""
KEPT_CLASSES = 64


class Runs(NamedTuple):
    """Stretches of equal values in the flat label: where each starts, and its value."""

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


def find_runs(read: Read, shape: tuple[int, ...], max_runs: int) -> Runs | None:
    """The runs of a layer in memory order, or None where there are more than ``max_runs``.

    >>> label = np.array([[0, 0, 1], [1, 1, 0]])
    >>> find_runs(lambda index: label[index], (2, 3), 99)
    Runs(starts=array([0, 2, 5]), values=array([0, 1, 0]))
    """
    starts, values = [], []
    total = offset = 0
    before: np.ndarray | None = None
    for piece in blocks(shape):
        flat = read((piece,)).reshape(-1)
        bits = _comparable(flat)
        edges = np.flatnonzero(bits[1:] != bits[:-1]) + 1
        if before is None or bits[0] != before:
            edges = np.concatenate((np.zeros(1, dtype=edges.dtype), edges))
        total += edges.size
        if total > max_runs:
            return None
        starts.append(edges + offset)
        values.append(flat[edges])
        before, offset = bits[-1], offset + flat.size
    return Runs(np.concatenate(starts), np.concatenate(values))


def _comparable(flat: np.ndarray) -> np.ndarray:
    """Floats as integers: compared faster, and NaN equals itself."""
    return flat.view(f"u{flat.dtype.itemsize}") if flat.dtype.kind == "f" and flat.dtype.itemsize <= 8 else flat


class RunRegion:
    """A box of a label given by runs.

    Voxels of the box are numbered in memory order. Each run covers one stretch of these numbers, so that counting and
    drawing need the runs' ends alone, never the voxels.

    Args:
        runs: runs of the whole label.
        shape: the label's shape, in memory order as all that follows.
        box: per axis the first voxel and the one after the last.
    """

    def __init__(self, runs: Runs, shape: tuple[int, ...], box: Box) -> None:
        self._first = np.array([a for a, _ in box], dtype=np.int64)
        self._size = tuple(b - a for a, b in box)
        ranks = np.append(_ranks(runs.starts, shape, box), prod(self._size))
        lengths = np.diff(ranks)
        inside = np.flatnonzero(lengths)
        values = runs.values[inside]
        order = np.argsort(values, kind="stable")
        inside, values = inside[order], values[order]
        short = np.uint32 if prod(self._size) <= np.iinfo(np.uint32).max else np.int64
        self._ranks = ranks[inside].astype(short)
        self._before = np.concatenate((np.zeros(1, dtype=short), np.cumsum(lengths[inside]).astype(short)))
        first = np.flatnonzero(np.concatenate((np.ones(min(1, values.size), dtype=bool), values[1:] != values[:-1])))
        self.classes: np.ndarray = values[first]
        self._class_before = self._before[first].astype(np.int64)
        self.counts: np.ndarray = np.diff(np.append(self._class_before, self._before[-1]))

    @property
    def nbytes(self) -> int:
        """See :class:`Region`."""
        return self._ranks.nbytes + self._before.nbytes

    def arrays(self) -> dict[str, np.ndarray]:
        """All that the region holds: for a file, out of which :meth:`of_arrays` takes it again."""
        box = np.array([self._first, self._size], dtype=np.int64)
        runs = {"ranks": self._ranks, "before": self._before}
        return {"box": box, "classes": self.classes, "class_before": self._class_before, "counts": self.counts, **runs}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> RunRegion:
        """The region that :meth:`arrays` was called of; they may be mapped files, of which drawing reads little."""
        region = cls.__new__(cls)
        region._first, region._size = arrays["box"][0], tuple(arrays["box"][1].tolist())
        region.classes, region.counts = arrays["classes"], arrays["counts"]
        region._class_before = arrays["class_before"]
        region._ranks, region._before = arrays["ranks"], arrays["before"]
        return region

    def draw(self, which: np.ndarray, rng: np.random.RandomState, read: Read) -> np.ndarray:
        """See :class:`Region`."""
        number = self._class_before[which] + rng.randint(0, self.counts[which], dtype=np.int64)
        # In the dtype of what is searched, else that would be converted as a whole.
        run = np.searchsorted(self._before, number.astype(self._before.dtype), side="right") - 1
        rank = self._ranks[run] + (number - self._before[run])
        voxels: np.ndarray = np.stack(np.unravel_index(rank, self._size), axis=1) + self._first
        return voxels


def _ranks(positions: np.ndarray, shape: tuple[int, ...], box: Box) -> np.ndarray:
    """How many voxels of the box lie before each flat position of the volume."""
    *outer, length = shape
    *outer_box, (low, high) = box
    if (low, high) == (0, length) and all((0, n) == bounds for n, bounds in zip(outer, outer_box, strict=True)):
        return positions
    legal = np.zeros(tuple(outer), dtype=bool)
    legal[tuple(slice(a, b) for a, b in outer_box)] = True
    legal = legal.reshape(-1)
    before = (np.cumsum(legal, dtype=np.int64) - legal) * (high - low)
    rows = positions // length
    within = np.clip(positions - rows * length - low, 0, high - low)
    ranks: np.ndarray = before[rows] + np.where(legal[rows], within, 0)
    return ranks


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
        for values in self._pieces(read):
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
        counts = np.concatenate([(v == value).sum(axis=-1).reshape(-1) for v in self._pieces(read)])
        before = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)))
        return remember(self._rows, which, before, KEPT_CLASSES)

    def _pieces(self, read: Read) -> Iterator[np.ndarray]:
        (low, high), *inner = self._box
        rest = tuple(slice(a, b) for a, b in inner)
        for piece in blocks(self._shape):
            first, stop = max(piece.start, low), min(piece.stop, high)
            if first < stop:
                yield read((slice(first, stop), *rest))


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
