# SPDX-License-Identifier: Apache-2.0
"""What all dictionary transforms share: the item's keys, its count, and the patches' dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor, get_track_meta
from monai.transforms import InvertibleTransform, LazyTransform, MapTransform
from monai.transforms.traits import MultiSampleTrait

from ..sampling import PatchGeometry
from ._arguments import Count, check_count
from ._base import PatchTransform, resolve_count
from ._meta import PATCH_LOCATION, Places
from ._padding import Fill
from ._reuse import ReusableIndex
from ._volumes import describe, is_volume, spatial_shape, up_to_date

Item = Mapping[Hashable, Any]


class PatchTransformd(MapTransform, InvertibleTransform, LazyTransform, MultiSampleTrait):
    """Cuts patches at the same places out of several volumes of an item.

    Args:
        keys: volumes to cut.
        cropper: the array transform.
        allow_missing_keys: leave out keys that an item lacks.
        padding_mode: one for all keys or one per key.
    """

    backend = PatchTransform.backend

    def __init__(
        self, keys: KeysCollection, cropper: PatchTransform, padding_mode: Any, allow_missing_keys: bool, lazy: bool
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        LazyTransform.__init__(self, lazy)
        self.cropper = cropper
        self.padding_mode = padding_mode
        modes = padding_mode if isinstance(padding_mode, list | tuple) else [padding_mode] * len(self.keys)
        if len(modes) != len(self.keys):
            raise ValueError(f"padding_mode has {len(modes)} entries for {len(self.keys)} keys: {padding_mode!r}")
        self._fills = dict(zip(self.keys, map(Fill.of, modes), strict=True))

    @property
    def requires_current_data(self) -> bool:
        """Whether pending operations must be applied before: where patches may be padded, voxels are needed."""
        return self.cropper.requires_current_data or any(fill is not None for fill in self._fills.values())

    @LazyTransform.lazy.setter
    def lazy(self, value: bool) -> None:
        self._lazy = value
        self.cropper.lazy = value

    @property
    def copies(self) -> bool:
        """See :class:`PatchTransform`."""
        return self.cropper.copies

    @copies.setter
    def copies(self, value: bool) -> None:
        self.cropper.copies = value

    def _present(self, data: Item) -> list[Hashable]:
        missing = [key for key in self.keys if key not in data]
        if (missing and not self.allow_missing_keys) or len(missing) == len(self.keys):
            raise KeyError(
                f"{describe(item=data)}: {type(self).__name__} finds no key {missing[0]!r} in an item that has "
                f"{list(data)}; name other keys"
                + ("" if self.allow_missing_keys else " or give allow_missing_keys=True")
            )
        return [key for key in self.keys if key in data]

    def _guide(self, data: Item, key: Hashable, index_key: str) -> tuple[Any, Callable[[], Any] | None]:
        """The weight map or label, None where the item may lack it; and what gives its index while that is valid."""
        if key not in data and not self.allow_missing_keys:
            raise KeyError(
                f"{describe(item=data)}: {type(self).__name__} finds no key {key!r} in an item that has {list(data)}"
            )
        guide, index = data.get(key), data.get(index_key)
        return guide, partial(index.of, guide) if isinstance(index, ReusableIndex) else None

    def _current(self, data: Item, lazy: bool, *guides: Hashable) -> dict[Hashable, Any]:
        """The item with its pending operations applied where voxels are needed."""
        needed = guides if lazy else (*guides, *self.keys)
        return {key: up_to_date(value) if key in needed else value for key, value in data.items()}

    def _geometry(self, data: Item) -> PatchGeometry:
        """The legal patches of the item's volumes, which must be of one shape."""
        geometries: dict[Hashable, PatchGeometry] = {}
        for key in self._present(data):
            may_pad = self._fills[key] is not None or self.cropper.border == "pad"
            geometries[key] = self.cropper.geometry(data[key], describe(data[key], key, data), may_pad)
        first, *others = geometries
        for key in others:
            if geometries[key].shape != geometries[first].shape:
                raise ValueError(
                    f"{describe(data[key], key, data)}: spatial shape {list(geometries[key].shape)} differs from that "
                    f"of key {first!r}, {list(geometries[first].shape)}; bring all keys onto one grid first (Spacingd, "
                    "ResampleToMatchd), or cut them by separate transforms"
                )
        return geometries[first]

    def _patches(
        self, data: Item, starts: np.ndarray, geometry: PatchGeometry, lazy: bool
    ) -> list[dict[Hashable, Any]]:
        """Dictionaries of the patches; what is not cut is shared between them."""
        keys = self._present(data)
        shared = {key: value for key, value in data.items() if key in keys or not self._dropped(value, geometry)}
        places = Places(starts, geometry)
        patches = [dict(shared) for _ in places.rows]
        for key in keys:
            cut = self.cropper.cut(data[key], places, lazy, self._fills[key])
            for patch, cropped in zip(patches, cut, strict=True):
                patch[key] = cropped
        if not get_track_meta() or not all(isinstance(patch[key], MetaTensor) for patch in patches[:1] for key in keys):
            for patch, location in zip(patches, places.locations, strict=True):
                patch[PATCH_LOCATION] = location
        return patches

    def make_ready(self, data: Item) -> None:
        """Have what is kept of an item's stored volumes made now, rather than at the first draw."""

    def _dropped(self, value: Any, geometry: PatchGeometry) -> bool:
        """Whether a value under an unlisted key is left out of the patches: whole volumes and their indices."""
        if isinstance(value, ReusableIndex):
            return True
        if not is_volume(value):
            return False
        return spatial_shape(value) == geometry.shape or tuple(value.shape) == geometry.shape

    def inverse(self, data: Item) -> dict[Hashable, Any]:
        """Put the patches of an item back: volumes of the original shape, zero around the patch."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.cropper.inverse(d[key])
        return d


class CountedPatchTransformd(PatchTransformd):
    """A dictionary transform that is told how many patches to take.

    Args:
        num_samples: an int, the name of a key with an item's own number, or a callable that is given the item.
        default_num_samples: for items that lack that key.
    """

    def __init__(
        self,
        keys: KeysCollection,
        cropper: PatchTransform,
        num_samples: Count,
        default_num_samples: int,
        padding_mode: Any,
        allow_missing_keys: bool,
        lazy: bool,
    ) -> None:
        super().__init__(keys, cropper, padding_mode, allow_missing_keys, lazy)
        self.num_samples = check_count(num_samples, key_allowed=True)
        self.default_num_samples = check_count(default_num_samples, key_allowed=False)
        if callable(default_num_samples):
            raise TypeError(f"default_num_samples must be an int, got {default_num_samples!r}")

    def count(self, data: Item) -> int:
        """Number of patches to take of an item."""
        if isinstance(self.num_samples, str):
            value = data.get(self.num_samples, self.default_num_samples)
            return resolve_count(value, data, describe(item=data), f"key {self.num_samples!r}")
        return resolve_count(self.num_samples, data, describe(item=data), "num_samples(item)")
