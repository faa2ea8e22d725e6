# SPDX-License-Identifier: Apache-2.0
"""Deterministic transforms that give a label or weight map an index, before a dataset caches the item."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from ..sampling import LabelIndex, WeightIndex, as_array
from ._items import Item
from ._reuse import ReusableIndex, label_index_key, weight_index_key
from ._volumes import describe, is_volume, up_to_date

__all__ = ["LabelIndexD", "LabelIndexDict", "LabelIndexd", "WeightIndexD", "WeightIndexDict", "WeightIndexd"]


class LabelIndexd(MapTransform):
    """Keeps where the classes of labels lie, for :class:`RandLabelPatchd` to use at each epoch.

    It is found at the first draw of a patch size that needs it, as voxels of frequent classes are found without, and is
    kept with the cached item, in each process that draws from it. Centers are the same with and without the index.

    Put it last among the deterministic transforms, so that ``CacheDataset`` keeps the index with the item. The index is
    used only for the very tensor it was made of, unchanged: after a random flip, an edit in place or a cast it is made
    anew. numpy arrays do not count their changes, and checking one costs as much as indexing it: they get no index.

    The tensor is made contiguous here, as ``CacheDataset`` would do (to a new tensor) afterwards.

    Args:
        keys: labels, channel-first.
        allow_missing_keys: leave out keys that an item lacks.

    Raises:
        KeyError: if an item lacks a key.

    >>> item = LabelIndexd("label")({"label": torch.tensor([[[0, 1], [1, 1]]])})
    >>> sorted(item)
    ['label', 'label_label_index']
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Item) -> dict[Hashable, Any]:
        """Add the labels' indices to an item."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = volume = _settled(d[key], describe(d[key], key, data))
            if isinstance(volume, torch.Tensor):
                d[label_index_key(key)] = ReusableIndex(LabelIndex(as_array(volume)), volume)
        return d


class WeightIndexd(MapTransform):
    """Keeps the row sums of weight maps, for :class:`RandWeightedPatchd` to use at each epoch.

    The sums are made at the first draw of a patch size, and kept with the cached item, in each process that draws from
    it. In all else like :class:`LabelIndexd`.

    Args:
        keys: weight maps, channel-first.
        allow_missing_keys: leave out keys that an item lacks.

    Raises:
        KeyError: if an item lacks a key.
        ValueError: if a weight is negative, NaN or infinite.

    >>> item = WeightIndexd("weights")({"weights": torch.ones(1, 4, 4)})
    >>> sorted(item)
    ['weights', 'weights_weight_index']
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Item) -> dict[Hashable, Any]:
        """Add the maps' indices to an item."""
        d = dict(data)
        for key in self.key_iterator(d):
            where = describe(d[key], key, data)
            d[key] = volume = _settled(d[key], where)
            if isinstance(volume, torch.Tensor):
                weights = as_array(volume)[0]
                index = WeightIndex(weights)
                try:
                    index.prepare(weights)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
                d[weight_index_key(key)] = ReusableIndex(index, volume)
        return d


def _settled(volume: Any, where: object) -> Any:
    """The volume up to date, and a tensor contiguous."""
    if not is_volume(volume):
        raise TypeError(f"{where}: expected a channel-first array or tensor, got {type(volume).__name__}")
    volume = up_to_date(volume)
    return volume if not isinstance(volume, torch.Tensor) or volume.is_contiguous() else volume.contiguous()


LabelIndexD = LabelIndexDict = LabelIndexd
WeightIndexD = WeightIndexDict = WeightIndexd
