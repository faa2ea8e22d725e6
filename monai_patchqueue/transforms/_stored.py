# SPDX-License-Identifier: Apache-2.0
"""Indices of stored labels and weight maps: made once for each size of patches, and kept beside the volume."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any

import numpy as np

from ..io.stored import StoredVolume
from ..sampling import Box, LabelIndex, LabelRule, RunRegion, WeightIndex
from ._kept import UnreadGuide, kept_indices

__all__ = ["FirstChannel", "StoredLabelIndex", "StoredWeightIndex", "index_label", "index_weights"]


class StoredLabelIndex:
    """In the place of a :class:`LabelIndex`, for a label that lies in a store.

    Draws are those of a :class:`LabelIndex` of the whole label, which is read when a box of legal centers is first met,
    and not again, by whichever process. A label that is too noisy for runs is read whole each time.

    Args:
        label: channel-first.
    """

    def __init__(self, label: StoredVolume) -> None:
        self._label = label

    def draw(self, label: Any, box: Box, rule: LabelRule, n: int, rng: np.random.RandomState) -> np.ndarray | None:
        """See :class:`LabelIndex`."""
        regions = self.prepare(box, rule)
        if regions is None:
            return self._index.draw(self._values, box, rule, n, rng)
        return LabelIndex.of_regions(self._label.shape, box, rule, regions).draw(self._label, box, rule, n, rng)

    def counts(self, label: Any, box: Box) -> dict[int | float, int]:
        """See :class:`LabelIndex`."""
        return self._index.counts(self._values, box)

    def prepare(self, box: Box, rule: LabelRule) -> dict[str, RunRegion] | None:
        """What is needed to draw from a box, read or made; None if that is the label itself."""

        def make() -> dict[str, dict[str, np.ndarray]] | None:
            regions = self._index.regions(self._values, box, rule)
            return None if regions is None else {name: region.arrays() for name, region in regions.items()}

        kept = self._label.indices.get(f"runs-{_digest(box, LabelIndex.layers(self._label.shape[0], rule))}", make)
        return None if kept is None else {name: RunRegion.of_arrays(arrays) for name, arrays in kept.items()}

    @cached_property
    def _values(self) -> np.ndarray:
        return self._label.values()

    @cached_property
    def _index(self) -> LabelIndex:
        return LabelIndex(self._values)


class FirstChannel:
    """The first channel of a stored weight map, of which the rows that are asked for are read.

    Args:
        weights: channel-first.
    """

    def __init__(self, weights: StoredVolume) -> None:
        self.volume = weights
        self.shape = weights.shape[1:]

    def __getitem__(self, index: tuple[int | slice, ...]) -> np.ndarray:
        """Part of the channel: ints and slices, one for each axis."""
        in_volume = (0, *index)
        return self.volume[in_volume]


class StoredWeightIndex:
    """In the place of a :class:`WeightIndex`, for a map that lies in a store; like :class:`StoredLabelIndex`."""

    def __init__(self, weights: FirstChannel) -> None:
        self._weights = weights

    def draw(self, weights: Any, box: Box, n: int, rng: np.random.RandomState) -> np.ndarray | None:
        """See :class:`WeightIndex`."""
        index = WeightIndex.of_sums(self._weights.shape, {box: self.prepare(box)})
        return index.draw(self._weights, box, n, rng)

    def prepare(self, box: Box) -> np.ndarray:
        """The cumulative sums that are needed to draw from a box, read or made."""

        def make() -> dict[str, np.ndarray]:
            values = self._weights.volume[0]
            return {"sums": WeightIndex(values).sums(values, box)}

        kept = self._weights.volume.indices.get(f"weights-{_digest(box)}", make)
        return (kept or make())["sums"]


def index_label(
    label: np.ndarray | StoredVolume | UnreadGuide, made_before: Callable[[], LabelIndex | None] | None = None
) -> LabelIndex | StoredLabelIndex:
    """The index of a label, wherever it lies; that of a file is kept, that of an array perhaps made before."""
    if isinstance(label, StoredVolume):
        return StoredLabelIndex(label)
    if isinstance(label, np.ndarray):
        return LabelIndex(label, made_before=made_before)
    index: LabelIndex = kept_indices.get(("label", label.source), lambda: LabelIndex(label.numbers))
    return index


def index_weights(weights: np.ndarray | FirstChannel, source: Hashable = None) -> WeightIndex | StoredWeightIndex:
    """The index of a weight map, wherever it lies; that of a known ``source`` is kept."""
    if isinstance(weights, FirstChannel):
        return StoredWeightIndex(weights)
    if source is None:
        return WeightIndex(weights)
    index: WeightIndex = kept_indices.get(("weights", source), lambda: WeightIndex(weights))
    return index


def _digest(*what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]
