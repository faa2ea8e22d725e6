# SPDX-License-Identifier: Apache-2.0
"""Patches of the items of a dataset: each transform takes a dictionary and gives a list of dictionaries."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Randomizable

from ..io.stored import StoredVolume
from ..sampling import PatchGeometry, PatchGrid
from ._arguments import Count, LabelProbabilities
from ._items import CountedPatchTransformd, Item, PatchTransformd
from ._meta import PATCH_INDEX
from ._reuse import label_index_key, weight_index_key
from ._stored import FirstChannel, StoredLabelIndex, StoredWeightIndex
from ._volumes import describe
from .array import GridPatchSamples, RandLabelPatch, RandUniformPatch, RandWeightedPatch

__all__ = [
    "GridPatchSamplesD",
    "GridPatchSamplesDict",
    "GridPatchSamplesd",
    "RandLabelPatchD",
    "RandLabelPatchDict",
    "RandLabelPatchd",
    "RandUniformPatchD",
    "RandUniformPatchDict",
    "RandUniformPatchd",
    "RandWeightedPatchD",
    "RandWeightedPatchDict",
    "RandWeightedPatchd",
]


class RandUniformPatchd(Randomizable, CountedPatchTransformd):
    """Dictionary version of :class:`RandUniformPatch`: the same places in all keys.

    >>> item = {"image": np.zeros((1, 8, 8)), "label": np.zeros((1, 8, 8)), "age": 40, "patches": 2}
    >>> patches = RandUniformPatchd(["image", "label"], (4, 4), num_samples="patches")(item)
    >>> len(patches), patches[0]["image"].shape, patches[0]["age"]
    (2, (1, 4, 4), 40)
    """

    cropper: RandUniformPatch

    def __init__(
        self,
        keys: KeysCollection,
        spatial_size: Sequence[int] | int,
        num_samples: Count = 1,
        border: str = "inside",
        padding_mode: Any = None,
        allow_missing_keys: bool = False,
        lazy: bool = False,
        *,
        default_num_samples: int = 1,
    ) -> None:
        cropper = RandUniformPatch(spatial_size, border=border, lazy=lazy)
        CountedPatchTransformd.__init__(
            self, keys, cropper, num_samples, default_num_samples, padding_mode, allow_missing_keys, lazy
        )

    def randomize(self, geometry: PatchGeometry, n: int) -> np.ndarray:
        """Draw the starts of ``n`` patches; int64 of shape [n, axes]."""
        self.cropper.R = self.R  # one stream of random numbers, this object's
        return self.cropper.randomize(geometry, n)

    def __call__(self, data: Item, lazy: bool | None = None) -> list[dict[Hashable, Any]]:
        """Take patches of an item; see :class:`PatchTransformd` for what they hold."""
        lazy_ = self.lazy if lazy is None else lazy
        data = self._current(data, lazy_)
        geometry = self._geometry(data)
        return self._patches(data, self.randomize(geometry, self.count(data)), geometry, lazy_)


class RandWeightedPatchd(Randomizable, CountedPatchTransformd):
    """Dictionary version of :class:`RandWeightedPatch`.

    Args:
        w_key: the weight map.
    """

    cropper: RandWeightedPatch

    def __init__(
        self,
        keys: KeysCollection,
        w_key: str,
        spatial_size: Sequence[int] | int,
        num_samples: Count = 1,
        on_empty: str = "raise",
        border: str = "inside",
        padding_mode: Any = None,
        allow_missing_keys: bool = False,
        lazy: bool = False,
        *,
        default_num_samples: int = 1,
    ) -> None:
        cropper = RandWeightedPatch(spatial_size, on_empty=on_empty, border=border, lazy=lazy)
        CountedPatchTransformd.__init__(
            self, keys, cropper, num_samples, default_num_samples, padding_mode, allow_missing_keys, lazy
        )
        self.w_key = w_key

    @property
    def requires_current_data(self) -> bool:
        """The map's voxels are read, so pending operations are applied before."""
        return True

    def randomize(self, data: Item, geometry: PatchGeometry, n: int) -> np.ndarray:
        """Draw the starts of ``n`` patches; int64 of shape [n, axes]."""
        self.cropper.R = self.R  # one stream of random numbers, this object's
        weights, made_before = self._guide(data, self.w_key, weight_index_key(self.w_key))
        return self.cropper.randomize(geometry, n, weights, describe(weights, self.w_key, data), made_before)

    def make_ready(self, data: Item) -> None:
        """See :class:`PatchTransformd`."""
        weights = data.get(self.w_key)
        if isinstance(weights, StoredVolume):
            StoredWeightIndex(FirstChannel(weights)).prepare(self._geometry(data).box)

    def __call__(self, data: Item, lazy: bool | None = None) -> list[dict[Hashable, Any]]:
        """Take patches of an item; see :class:`PatchTransformd` for what they hold."""
        lazy_ = self.lazy if lazy is None else lazy
        data = self._current(data, lazy_, self.w_key)
        geometry = self._geometry(data)
        return self._patches(data, self.randomize(data, geometry, self.count(data)), geometry, lazy_)


class RandLabelPatchd(Randomizable, CountedPatchTransformd):
    """Dictionary version of :class:`RandLabelPatch`.

    Args:
        label_key: the label.
    """

    cropper: RandLabelPatch

    def __init__(
        self,
        keys: KeysCollection,
        label_key: str,
        spatial_size: Sequence[int] | int,
        num_samples: Count = 1,
        label_probabilities: LabelProbabilities = None,
        foreground_fraction: float | None = None,
        ignore_label: int | None = None,
        on_empty: str = "raise",
        border: str = "inside",
        padding_mode: Any = None,
        allow_missing_keys: bool = False,
        lazy: bool = False,
        *,
        default_num_samples: int = 1,
    ) -> None:
        cropper = RandLabelPatch(
            spatial_size,
            label_probabilities=label_probabilities,
            foreground_fraction=foreground_fraction,
            ignore_label=ignore_label,
            on_empty=on_empty,
            border=border,
            lazy=lazy,
        )
        CountedPatchTransformd.__init__(
            self, keys, cropper, num_samples, default_num_samples, padding_mode, allow_missing_keys, lazy
        )
        self.label_key = label_key

    @property
    def requires_current_data(self) -> bool:
        """The label's voxels are read, so pending operations are applied before."""
        return True

    def randomize(self, data: Item, geometry: PatchGeometry, n: int) -> np.ndarray:
        """Draw the starts of ``n`` patches; int64 of shape [n, axes]."""
        self.cropper.R = self.R  # one stream of random numbers, this object's
        label, made_before = self._guide(data, self.label_key, label_index_key(self.label_key))
        return self.cropper.randomize(geometry, n, label, describe(label, self.label_key, data), made_before)

    def make_ready(self, data: Item) -> None:
        """See :class:`PatchTransformd`."""
        label = data.get(self.label_key)
        if isinstance(label, StoredVolume):
            for rule in self.cropper.rules:
                StoredLabelIndex(label).prepare(self._geometry(data).box, rule)

    def __call__(self, data: Item, lazy: bool | None = None) -> list[dict[Hashable, Any]]:
        """Take patches of an item; see :class:`PatchTransformd` for what they hold."""
        lazy_ = self.lazy if lazy is None else lazy
        data = self._current(data, lazy_, self.label_key)
        geometry = self._geometry(data)
        return self._patches(data, self.randomize(data, geometry, self.count(data)), geometry, lazy_)


class GridPatchSamplesd(PatchTransformd):
    """Dictionary version of :class:`GridPatchSamples`."""

    cropper: GridPatchSamples

    def __init__(
        self,
        keys: KeysCollection,
        spatial_size: Sequence[int] | int,
        overlap: float | Sequence[float] = 0,
        pad_overlap: bool = False,
        border: str = "inside",
        padding_mode: Any = None,
        allow_missing_keys: bool = False,
        lazy: bool = False,
    ) -> None:
        cropper = GridPatchSamples(spatial_size, overlap, pad_overlap, border, lazy=lazy)
        super().__init__(keys, cropper, padding_mode, allow_missing_keys, lazy)

    def grid(self, shape: Sequence[int]) -> PatchGrid:
        """The grid over a volume of this spatial shape."""
        return self.cropper.grid(shape)

    def of(self, data: Item) -> PatchGrid:
        """The grid over an item's volumes."""
        return self.grid(self._geometry(data).shape)

    def count(self, shape: Sequence[int]) -> int:
        """How many patches a volume of this spatial shape gives."""
        return self.cropper.count(shape)

    def __call__(
        self, data: Item, lazy: bool | None = None, first: int = 0, stop: int | None = None
    ) -> list[dict[Hashable, Any]]:
        """Take patches of an item; see :class:`PatchTransformd` for what they hold.

        Args:
            data: the item.
            lazy: overrides the constructor's ``lazy``.
            first: number of the first patch to take.
            stop: number of the one after the last; None: all that follow.
        """
        lazy_ = self.lazy if lazy is None else lazy
        data = self._current(data, lazy_)
        geometry = self._geometry(data)
        patches = self._patches(data, self.grid(geometry.shape).starts[first:stop], geometry, lazy_)
        for patch in patches if first else ():
            for key in self._present(patch):
                if isinstance(patch[key], MetaTensor):
                    patch[key].meta[PATCH_INDEX] += first
        return patches


RandUniformPatchD = RandUniformPatchDict = RandUniformPatchd
RandWeightedPatchD = RandWeightedPatchDict = RandWeightedPatchd
RandLabelPatchD = RandLabelPatchDict = RandLabelPatchd
GridPatchSamplesD = GridPatchSamplesDict = GridPatchSamplesd
