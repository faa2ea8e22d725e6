# SPDX-License-Identifier: Apache-2.0
"""What all array transforms share: arguments, cutting, metadata, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from monai.data import MetaTensor, get_track_meta
from monai.transforms import BorderPad, InvertibleTransform, LazyTransform, SpatialCrop
from monai.transforms.traits import MultiSampleTrait
from monai.utils import TraceKeys, TransformBackends

from ..io.stored import StoredVolume
from ..sampling import PatchGeometry
from ._arguments import Count, as_int, check_border, check_count, check_size
from ._meta import PatchMeta, Places
from ._padding import Fill
from ._volumes import cut, describe, fitting_geometry, in_memory, up_to_date


class PatchTransform(InvertibleTransform, LazyTransform, MultiSampleTrait):
    """Cuts patches of one size out of a volume at given starts."""

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.TORCH, TransformBackends.NUMPY]

    copies = True
    """Whether patches have memory of their own. Not while whoever runs the pipeline copies them next: then they may be
    views of the volume."""

    def __init__(self, spatial_size: Sequence[int] | int, border: str, padding_mode: Any, lazy: bool) -> None:
        LazyTransform.__init__(self, lazy)
        self.spatial_size = check_size(spatial_size)
        self.border = check_border(border)
        self.padding_mode = padding_mode
        self._fill = Fill.of(padding_mode)

    @property
    def requires_current_data(self) -> bool:
        """Whether pending operations must be applied before: where patches may be padded, voxels are needed."""
        return self._fill is not None or self.border == "pad"

    def geometry(self, volume: Any, where: object, may_pad: bool | None = None) -> PatchGeometry:
        """The legal patches of a volume; see :func:`fitting_geometry` for what it raises."""
        if may_pad is None:
            may_pad = self._fill is not None or self.border == "pad"
        return fitting_geometry(volume, where, self.spatial_size, self.border, may_pad)

    def cut(self, volume: Any, places: Places, lazy: bool = False, fill: Fill | None = None) -> list[Any]:
        """Patches of a volume.

        Args:
            volume: channel-first, of the geometry's spatial shape.
            places: where they lie.
            lazy: leave the crop pending on a MetaTensor; patches that overhang are cut all the same.
            fill: what lies outside the volume, by default what ``padding_mode`` says.
        """
        rows, geometry = places.rows, places.geometry
        lazy = lazy and isinstance(volume, MetaTensor) and not geometry.overhangs(places.starts)
        volume = volume if lazy else up_to_date(volume)
        meta = None
        if isinstance(volume, StoredVolume) and volume.kind != "array" and not self.copies:
            volume = volume.lazily()
        kind = getattr(volume, "kind", None)  # of a volume that is read lazily
        if get_track_meta() and kind in (None, "MetaTensor") and isinstance(getattr(volume, "meta", None), dict):
            meta = PatchMeta(volume, places, self.get_transform_info())
            if lazy:
                return [meta.cut_lazily(i, volume) for i in range(len(rows))]
        if isinstance(volume, torch.Tensor):
            volume = in_memory(volume, described=meta is not None)
        fill = fill or self._fill or Fill()
        patches = cut(volume, rows, geometry, fill, self.copies)
        if meta is None and kind in ("MetaTensor", "tensor"):
            patches = [torch.as_tensor(patch) for patch in patches]
        return patches if meta is None else [meta.wrap(i, patch) for i, patch in enumerate(patches)]

    def inverse(self, patch: MetaTensor) -> MetaTensor:
        """Put a patch back: a volume of the original shape, zero around the patch.

        Raises:
            ValueError: if the patch does not come from this class of transform.
        """
        operations = patch.applied_operations
        name = type(self).__name__
        # By class, not by id as MONAI has it: workers hold copies of the transform.
        found = [i for i, operation in enumerate(operations) if operation.get(TraceKeys.CLASS_NAME) == name]
        if not found:
            raise ValueError(f"the patch was not cut by {name}; its applied operations name no such transform")
        extra = operations.pop(found[-1])[TraceKeys.EXTRA_INFO]
        padded = extra.get("padded", [0] * len(extra["cropped"]))
        shape = patch.shape[1:]
        crop = SpatialCrop(
            roi_start=padded[::2], roi_end=[n - after for n, after in zip(shape, padded[1::2], strict=True)]
        )
        pad = BorderPad(extra["cropped"])
        with crop.trace_transform(False), pad.trace_transform(False):
            return pad(crop(patch))


class CountedPatchTransform(PatchTransform):
    """A patch transform that is told how many patches to take."""

    def __init__(
        self,
        spatial_size: Sequence[int] | int,
        num_samples: Count,
        border: str,
        padding_mode: Any,
        lazy: bool,
    ) -> None:
        super().__init__(spatial_size, border, padding_mode, lazy)
        self.num_samples = check_count(num_samples, key_allowed=False)

    def count(self, img: Any) -> int:
        """Number of patches to take of a volume."""
        return resolve_count(self.num_samples, img, describe(img), "num_samples(img)")


def resolve_count(num_samples: Any, argument: Any, where: object, what: str) -> int:
    """``num_samples`` as int, calling it where it is callable."""
    value = num_samples(argument) if callable(num_samples) else num_samples
    count = as_int(value)
    if count is None or count < 0:
        raise ValueError(f"{where}, {what}: the number of patches must be an int of 0 or more, got {value!r}")
    return count
