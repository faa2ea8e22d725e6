# SPDX-License-Identifier: Apache-2.0
"""Metadata of patches: what all patches of a volume share is computed once."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms.croppad.functional import crop_func
from monai.utils import ImageMetaKey, MetaKeys, TraceKeys

from ..io.lazy_meta_tensor import fresh_attributes
from ..sampling import PatchGeometry

PATCH_INDEX = str(ImageMetaKey.PATCH_INDEX)
CROP_CENTER = "crop_center"
PATCH_LOCATION = "patch_location"
PATCH_META = (PATCH_INDEX, CROP_CENTER, PATCH_LOCATION)
"""What a patch's metadata say beside its volume's."""

Location = tuple[tuple[int, int], ...]


class Places:
    """Where the patches of an item lie: the same for all of its volumes, and so computed once.

    Args:
        starts: integers of shape [n, axes].
        geometry: the volumes' and the patches' size.
    """

    def __init__(self, starts: np.ndarray, geometry: PatchGeometry) -> None:
        self.starts = starts
        self.geometry = geometry
        self.rows: list[list[int]] = starts.tolist()

    @cached_property
    def locations(self) -> list[Location]:
        """Start and stop per axis of each patch, counted from the unpadded volume."""
        return [tuple((a, a + s) for a, s in zip(row, self.geometry.size, strict=True)) for row in self.rows]

    @cached_property
    def centers(self) -> list[tuple[int, ...]]:
        """The center of each patch."""
        return list(map(tuple, (self.starts + self.geometry.half).tolist()))

    @cached_property
    def beside(self) -> tuple[list[list[int]], list[list[int]]]:
        """How many voxels of the volume lie before and after each patch, and how far it overhangs there, per axis."""
        after = np.array(self.geometry.shape) - np.array(self.geometry.size) - self.starts
        beside = np.stack((self.starts, after), axis=-1).reshape(len(self.rows), -1)
        return np.maximum(beside, 0).tolist(), np.maximum(-beside, 0).tolist()


class PatchMeta:
    """Makes MetaTensors of the patches of one volume.

    Args:
        volume: has ``meta``, a mapping, and may have MetaTensor's other attributes.
        places: where they lie.
        info: the transform's entry for the trace of applied operations.
    """

    def __init__(self, volume: Any, places: Places, info: dict[Any, Any]) -> None:
        self._places = places
        self._info = {**info, TraceKeys.ORIG_SIZE: places.geometry.shape, TraceKeys.LAZY: False}
        self._meta = dict(volume.meta)
        if isinstance(volume, MetaTensor):
            self._attributes = dict(volume.__dict__)
        else:
            self._attributes = fresh_attributes(self._meta, len(volume.shape))
        self._operations = list(getattr(volume, "applied_operations", ()))
        affine = np.asarray(self._meta.get(MetaKeys.AFFINE, np.eye(4)), dtype=np.float64)
        starts = places.starts
        axes = min(affine.shape[-1] - 1, starts.shape[1])
        self._affines = np.repeat(affine[None], len(starts), axis=0)
        self._affines[:, :, -1] += starts[:, :axes] @ affine[:, :axes].T

    def wrap(self, i: int, patch: Any) -> MetaTensor:
        """Patch ``i`` as MetaTensor."""
        wrapped = patch if isinstance(patch, MetaTensor) else torch.as_tensor(patch).as_subclass(MetaTensor)
        meta = dict(self._meta)
        meta[MetaKeys.AFFINE] = torch.from_numpy(self._affines[i].copy())
        self._note(i, meta)
        wrapped.__dict__.update(self._attributes)
        wrapped._meta = meta
        wrapped._pending_operations = []
        wrapped._applied_operations = list(self._operations)
        if self._info[TraceKeys.TRACING]:
            wrapped._applied_operations.append(self._trace(i))
        return wrapped

    def cut_lazily(self, i: int, volume: MetaTensor) -> MetaTensor:
        """The whole volume with the crop as a pending operation, as MONAI's lazy crops give it."""
        slices = (slice(a, b) for a, b in self._places.locations[i])
        pending: MetaTensor = crop_func(volume, (slice(None), *slices), True, dict(self._info))
        self._note(i, pending.meta)
        return pending

    def _note(self, i: int, meta: dict[Any, Any]) -> None:
        """Say in ``meta`` which patch it is and where it comes from."""
        meta[PATCH_INDEX] = i
        meta[CROP_CENTER] = self._places.centers[i]
        meta[PATCH_LOCATION] = self._places.locations[i]

    def _trace(self, i: int) -> dict[Any, Any]:
        cropped, padded = self._places.beside
        extra = {"cropped": list(cropped[i])}
        if any(padded[i]):
            extra["padded"] = list(padded[i])
        return {**self._info, TraceKeys.EXTRA_INFO: extra}
