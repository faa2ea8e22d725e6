# SPDX-License-Identifier: Apache-2.0
"""Drawing voxels of given classes from a label map, without an index of all voxels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np

from .choose import choose
from .geometry import Box
from .memory_order import AxisOrder
from .recent import remember
from .regions import Read, Region, RowRegion, RunRegion, Runs, find_runs

__all__ = ["LabelIndex", "LabelRule"]

KEPT_REGIONS = 8


@dataclass(frozen=True)
class LabelRule:
    """Which classes are drawn and how often.

    Args:
        classes: probabilities (of any sum) by class; ``"positive"``: every voxel > 0 equally likely; ``"balanced"``:
            every class > 0 equally likely; ``"any"``: every voxel equally likely.
        ignore: a class whose voxels are never drawn.
    """

    classes: Mapping[int, float] | Literal["positive", "balanced", "any"] = "positive"
    ignore: int | None = None


class Layer(NamedTuple):
    """What is read of a label: its values, or whether a channel (any channel, not this one) is set."""

    kind: Literal["values", "channel", "any", "not"]
    channel: int | None = None
    ignore: int | None = None

    @property
    def name(self) -> str:
        """What the layer is called in a file."""
        return "-".join(str(part) for part in self if part is not None)


class Group(NamedTuple):
    """Classes of one layer with the weights by which they are drawn."""

    layer: Layer
    region: Region
    which: np.ndarray
    weights: np.ndarray


class LabelIndex:
    """Where the classes of a label lie, as runs in memory order; for any number of boxes of legal centers.

    The label itself is not kept: the same label is handed to :meth:`draw` again.

    Args:
        label: channel-first, of any dtype and any memory order. With one channel its values are the classes; with
            several a class is a channel's index, and a voxel belongs to each class whose channel is > 0 there.
        max_runs: with more runs than this the index falls back on counts per row; by default a sixteenth of the voxels.
        keep_runs: keep the runs for other boxes than those that were drawn from.

    >>> label = np.array([[[0, 0, 0], [0, 1, 2]]])
    >>> index = LabelIndex(label)
    >>> index.counts(label, ((0, 2), (0, 3)))
    {0: 4, 1: 1, 2: 1}
    >>> index.draw(label, ((0, 2), (0, 3)), LabelRule({2: 1.0}), 2, np.random.RandomState(0)).tolist()
    [[1, 2], [1, 2]]
    """

    def __init__(self, label: np.ndarray, max_runs: int | None = None, keep_runs: bool = True) -> None:
        self._keep_runs = keep_runs
        self.channels = label.shape[0]
        self._order = AxisOrder.of(label[0])
        self._shape = tuple(label.shape[1:][axis] for axis in self._order.axes)
        self._max_runs = max(4096, prod(self._shape) // 16) if max_runs is None else max_runs
        self._runs: dict[Layer, Runs | None] = {}
        self._regions: dict[tuple[Layer, Box], Region] = {}

    def prepare(self, label: np.ndarray) -> None:
        """Find the runs that most rules need now, not at the first draw."""
        for layer in self._class_layers(self.channels, None):
            self._find(label, layer)
        if self.channels > 1:
            self._find(label, Layer("any"))

    def regions(self, label: np.ndarray, box: Box, rule: LabelRule) -> dict[str, RunRegion] | None:
        """All that :meth:`draw` uses of a C-ordered label for a box and a rule; None where the label is too noisy."""
        found = {layer.name: self._region(label, layer, box) for layer in self.layers(self.channels, rule)}
        runs = {name: region for name, region in found.items() if isinstance(region, RunRegion)}
        return runs if len(runs) == len(found) else None

    @classmethod
    def of_regions(
        cls, shape: tuple[int, ...], box: Box, rule: LabelRule, regions: Mapping[str, RunRegion]
    ) -> LabelIndex:
        """The index of a C-ordered label whose :meth:`regions` were kept; drawing reads nothing of the label."""
        index = cls.__new__(cls)
        index.channels, index._shape, index._max_runs, index._keep_runs = shape[0], shape[1:], 0, False
        index._order, index._runs = AxisOrder(tuple(range(len(shape) - 1))), {}
        index._regions = {(layer, box): regions[layer.name] for layer in cls.layers(shape[0], rule)}
        return index

    @classmethod
    def layers(cls, channels: int, rule: LabelRule) -> list[Layer]:
        """What a rule reads of a label."""
        if channels > 1 and rule.classes == "positive":
            return [Layer("any", ignore=rule.ignore)]
        if channels > 1 and rule.classes == "any":
            return [Layer("not", ignore=rule.ignore)]
        return cls._class_layers(channels, rule.ignore)

    @staticmethod
    def _class_layers(channels: int, ignore: int | None) -> list[Layer]:
        if channels == 1:
            return [Layer("values")]
        return [Layer("channel", c, ignore) for c in range(channels) if c != ignore]

    @property
    def nbytes(self) -> int:
        """Bytes that the index takes."""
        runs = sum(found.starts.nbytes + found.values.nbytes for found in list(self._runs.values()) if found)
        return runs + sum(region.nbytes for region in list(self._regions.values()))

    def counts(self, label: np.ndarray, box: Box) -> dict[int | float, int]:
        """Voxels per class inside ``box``; classes without any are left out."""
        found: dict[int | float, int] = {}
        for layer in self._class_layers(self.channels, None):
            region = self._region(label, layer, box)
            for value, count in zip(region.classes.tolist(), region.counts.tolist(), strict=True):
                if layer.kind == "values":
                    found[int(value) if value == value and int(value) == value else value] = count
                elif value:
                    found[layer.channel or 0] = count
        return found

    def draw(self, label: Any, box: Box, rule: LabelRule, n: int, rng: np.random.RandomState) -> np.ndarray | None:
        """Draw ``n`` voxels: first a class by the rule, among those present in ``box``, then a voxel of it, uniformly.

        Args:
            label: the label this index was made of, or what reads channels of it.
            box: legal centers, per axis the first and the one after the last.
            rule: which classes, and how often.
            n: number of voxels.
            rng: where the randomness comes from.

        Returns:
            int64 voxels of shape [n, axes], or None where no voxel of the box may be drawn.

        Raises:
            ValueError: if classes are to be balanced and a value > 0 is no integer.
        """
        groups = self._groups(label, self._order.box(box), rule)
        weights = np.concatenate([group.weights for group in groups])
        if not (weights > 0).any():
            return None
        picked = choose(np.cumsum(weights), rng.random_sample(n))
        voxels = np.empty((n, len(box)), dtype=np.int64)
        offset = 0
        for group in groups:
            mine = np.flatnonzero((picked >= offset) & (picked < offset + group.weights.size))
            if mine.size:
                read = self._read(label, group.layer)
                voxels[mine] = group.region.draw(group.which[picked[mine] - offset], rng, read)
            offset += group.weights.size
        return self._order.restore(voxels)

    def _groups(self, label: np.ndarray, box: Box, rule: LabelRule) -> list[Group]:
        single = self.channels == 1
        groups = []
        for layer in self.layers(self.channels, rule):
            region = self._region(label, layer, box)
            if single:
                weights = _weights(region, rule)
            else:
                p = rule.classes.get(layer.channel or 0, 0.0) if isinstance(rule.classes, Mapping) else 1.0
                weights = np.where(region.classes == 1, p, 0.0)
            groups.append(Group(layer, region, np.arange(weights.size), weights))
        return groups

    def _read(self, label: np.ndarray, layer: Layer) -> Read:
        def channel(c: int, index: tuple[slice | int, ...]) -> np.ndarray:
            part: np.ndarray = self._order.view(label[c])[index]
            return part

        if layer.kind == "values":
            return lambda index: channel(0, index)
        members = range(self.channels) if layer.kind == "any" else [] if layer.channel is None else [layer.channel]
        ignored = None if layer.ignore is None or layer.ignore >= self.channels else layer.ignore

        def read(index: tuple[slice | int, ...]) -> np.ndarray:
            member = np.logical_or.reduce([channel(c, index) > 0 for c in members]) if members else None
            kept = None if ignored is None else ~(channel(ignored, index) > 0)
            if member is None:
                return np.ones(channel(0, index).shape, dtype=bool) if kept is None else kept
            result: np.ndarray = member if kept is None else member & kept
            return result

        return read

    def _find(self, label: np.ndarray, layer: Layer) -> Runs | None:
        if layer in self._runs:
            return self._runs[layer]
        runs = find_runs(self._read(label, layer), self._shape, self._max_runs)
        if self._keep_runs:
            self._runs[layer] = runs
        return runs

    def _region(self, label: np.ndarray, layer: Layer, box: Box) -> Region:
        """``box`` in memory order."""
        known = self._regions.get((layer, box))
        if known is not None:
            return known
        runs = self._find(label, layer)
        region: Region
        if runs is None:
            region = RowRegion(self._read(label, layer), self._shape, box)
        else:
            region = RunRegion(runs, self._shape, box)
        return remember(self._regions, (layer, box), region, KEPT_REGIONS * self.channels)


def _weights(region: Region, rule: LabelRule) -> np.ndarray:
    """The weight of each class of a single-channel label."""
    classes, counts = region.classes, region.counts.astype(np.float64)
    if isinstance(rule.classes, Mapping):
        weights = np.array([rule.classes.get(value, 0.0) for value in classes.tolist()], dtype=np.float64)
    elif rule.classes == "any":
        weights = counts
    elif rule.classes == "positive":
        weights = np.where(classes > 0, counts, 0.0)
    else:
        fractions = classes[(classes > 0) & (classes != np.floor(classes))]
        if fractions.size:
            raise ValueError(f"balanced classes need whole numbers, and the label holds {fractions[0]}")
        weights = np.where(classes > 0, 1.0, 0.0)
    return weights if rule.ignore is None else np.where(classes == rule.ignore, 0.0, weights)
