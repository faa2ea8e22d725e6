# SPDX-License-Identifier: Apache-2.0
"""Drawing voxels of given classes from a label map, without an index of all voxels."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np

from .choose import choose
from .geometry import Box
from .memory_order import AxisOrder
from .recent import remember
from .regions import Read, Region, RowRegion, RunRegion, find_runs, pieces
from .trials import Member, try_voxels

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

    Voxels of frequent classes are drawn by trial (see :func:`try_voxels`), and a box's runs are found when that fails.
    The label itself is not kept: the same label is handed to :meth:`draw` again.

    Args:
        label: channel-first, of any dtype and any memory order. With one channel its values are the classes; with
            several a class is a channel's index, and a voxel belongs to each class whose channel is > 0 there.
        max_runs: where a box has more runs than this the index falls back on counts per row; by default a sixteenth of
            its voxels.
        made_before: gives the index that was made of this very label before, if there is one; asked when trials fail.

    >>> label = np.array([[[0, 0, 0], [0, 1, 2]]])
    >>> index = LabelIndex(label)
    >>> index.counts(label, ((0, 2), (0, 3)))
    {0: 4, 1: 1, 2: 1}
    >>> index.draw(label, ((0, 2), (0, 3)), LabelRule({2: 1.0}), 2, np.random.RandomState(0)).tolist()
    [[1, 2], [1, 2]]
    """

    def __init__(
        self,
        label: np.ndarray,
        max_runs: int | None = None,
        made_before: Callable[[], LabelIndex | None] | None = None,
    ) -> None:
        self._made_before = made_before
        self.channels = label.shape[0]
        self._order = AxisOrder.of(label[0])
        self._shape = tuple(label.shape[1:][axis] for axis in self._order.axes)
        self._max_runs = max_runs
        self._regions: dict[tuple[Layer, Box], Region] = {}

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
        index.channels, index._shape, index._max_runs, index._made_before = shape[0], shape[1:], 0, None
        index._order = AxisOrder(tuple(range(len(shape) - 1)))
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
        return sum(region.nbytes for region in list(self._regions.values()))

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
        bounds = self._order.box(box)
        tried = self._try(label, bounds, rule, n, rng)
        if tried is not None:
            return self._order.restore(tried)
        index = (self._made_before and self._made_before()) or self
        groups = index._groups(label, bounds, rule)
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

    def _try(self, label: Any, box: Box, rule: LabelRule, n: int, rng: np.random.RandomState) -> np.ndarray | None:
        """Voxels drawn by trial, in memory order; None where that does not do."""
        size = tuple(b - a for a, b in box)
        weights: list[float] = []
        numbers: list[np.ndarray] = []
        for layer in self.layers(self.channels, rule):
            wanted = _wanted(layer, rule)
            if wanted is None:
                return None
            if not wanted:
                continue
            # Channels may overlap, so each layer has looks of its own.
            weights += (weight for weight, _ in wanted)
            found = try_voxels(self._look(label, layer, box), prod(size), [member for _, member in wanted], n, rng)
            if found is None:
                return None
            numbers += found
        if not weights:
            return None
        picked = choose(np.cumsum(weights), rng.random_sample(n))
        drawn = np.array(numbers)[picked, np.arange(n)]
        voxels: np.ndarray = np.array(np.unravel_index(drawn, size)).T + np.array([a for a, _ in box])
        return voxels

    def _look(self, label: Any, layer: Layer, box: Box) -> Callable[[np.ndarray], np.ndarray]:
        """Gives the values of voxels of a box by their numbers, from a label that is not in memory by its runs."""
        if not isinstance(label, np.ndarray):
            region = self._region(label, layer, box)
            if isinstance(region, RunRegion):
                return region.values
        read, size = self._read(label, layer), tuple(b - a for a, b in box)

        def look(numbers: np.ndarray) -> np.ndarray:
            return read(tuple(axis + a for axis, (a, _) in zip(np.unravel_index(numbers, size), box, strict=True)))

        return look

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
        def channel(c: int, index: tuple[slice | int | np.ndarray, ...]) -> np.ndarray:
            part: np.ndarray = self._order.view(label[c])[index]
            return part

        if layer.kind == "values":
            return lambda index: channel(0, index)
        members = range(self.channels) if layer.kind == "any" else [] if layer.channel is None else [layer.channel]
        ignored = None if layer.ignore is None or layer.ignore >= self.channels else layer.ignore

        def read(index: tuple[slice | int | np.ndarray, ...]) -> np.ndarray:
            member = np.logical_or.reduce([channel(c, index) > 0 for c in members]) if members else None
            kept = None if ignored is None else ~(channel(ignored, index) > 0)
            if member is None:
                return np.ones(channel(0, index).shape, dtype=bool) if kept is None else kept
            result: np.ndarray = member if kept is None else member & kept
            return result

        return read

    def _region(self, label: np.ndarray, layer: Layer, box: Box) -> Region:
        """``box`` in memory order."""
        known = self._regions.get((layer, box))
        if known is not None:
            return known
        read = self._read(label, layer)
        most = max(4096, prod(b - a for a, b in box) // 16) if self._max_runs is None else self._max_runs
        runs = find_runs(pieces(read, self._shape, box), most)
        region = RowRegion(read, self._shape, box) if runs is None else RunRegion(runs, box)
        return remember(self._regions, (layer, box), region, KEPT_REGIONS * self.channels)


def _wanted(layer: Layer, rule: LabelRule) -> list[tuple[float, Member]] | None:
    """Each class of a layer that may be drawn, with its weight; None where any value may be a class."""
    if layer.kind != "values":
        weight = rule.classes.get(layer.channel or 0, 0.0) if isinstance(rule.classes, Mapping) else 1.0
        return [(weight, lambda values: values)] if weight > 0 else []
    if isinstance(rule.classes, Mapping):
        wanted = {class_: p for class_, p in rule.classes.items() if p > 0 and class_ != rule.ignore}
        return [(p, partial(operator.eq, class_)) for class_, p in wanted.items()]
    if rule.classes == "balanced":
        return None
    positive = rule.classes == "positive"

    def member(values: np.ndarray) -> np.ndarray:
        kept: np.ndarray = values > 0 if positive else np.ones(values.shape, dtype=bool)
        return kept if rule.ignore is None else kept & (values != rule.ignore)

    return [(1.0, member)]


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
