# SPDX-License-Identifier: Apache-2.0
"""Patches of one array: each transform takes a channel-first volume and gives a list of patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import Randomizable

from ..io.stored import StoredVolume
from ..sampling import (
    LabelIndex,
    LabelRule,
    PatchGeometry,
    PatchGrid,
    WeightIndex,
    overlap_voxels,
    resolve_size,
)
from ._arguments import LabelProbabilities, check_choice, check_fraction, check_overlap, check_rule
from ._base import CountedPatchTransform, PatchTransform
from ._kept import UnreadGuide
from ._meta import Places
from ._stored import FirstChannel, StoredLabelIndex, index_label, index_weights
from ._volumes import REMEDY, describe, no_center, same_shape, up_to_date

__all__ = ["GridPatchSamples", "RandLabelPatch", "RandUniformPatch", "RandWeightedPatch"]

ON_EMPTY = ("raise", "uniform")


class RandUniformPatch(Randomizable, CountedPatchTransform):
    """Patches from anywhere in the volume, each legal position equally likely.

    Args:
        spatial_size: the patch's size, one int for all axes or one per axis; -1 is the whole axis.
        num_samples: how many patches, or a callable that is given the volume.
        border: ``"inside"``: every start 0 … N - s is equally likely. ``"clamp"``: every voxel is equally likely to be
            chosen as center, and the patch is then moved inside. ``"pad"``: every voxel is equally likely to be the
            center, and the patch may overhang.
        padding_mode: what lies outside the volume: a mode by torch's or numpy's name, or a number. With None a volume
            smaller than the patch is an error (``border="pad"``: zeros).
        lazy: leave the crop as a pending operation on a MetaTensor.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if an argument has an impossible value.

    >>> crop = RandUniformPatch((2, 2), num_samples=3).set_random_state(0)
    >>> [patch.shape for patch in crop(np.zeros((1, 5, 6)))]
    [(1, 2, 2), (1, 2, 2), (1, 2, 2)]
    """

    def __init__(
        self,
        spatial_size: Sequence[int] | int,
        num_samples: int | Callable[[Any], int] = 1,
        border: str = "inside",
        padding_mode: Any = None,
        lazy: bool = False,
    ) -> None:
        CountedPatchTransform.__init__(self, spatial_size, num_samples, border, padding_mode, lazy)

    def randomize(self, geometry: PatchGeometry, n: int) -> np.ndarray:
        """Draw the starts of ``n`` patches; int64 of shape [n, axes]."""
        return geometry.starts(geometry.draw_uniform(n, self.R))

    def __call__(self, img: Any, lazy: bool | None = None) -> list[Any]:
        """Take patches of a volume.

        Args:
            img: channel-first array, tensor, MetaTensor or lazily read volume, of shape [C, *spatial].
            lazy: overrides the constructor's ``lazy``.

        Returns:
            Copies, of the volume's type, dtype and order of axes in memory, each of shape [C, *patch].

        Raises:
            ValueError: if the volume is smaller than the patch, or has another number of axes.
        """
        lazy_ = self.lazy if lazy is None else lazy
        img = img if lazy_ else up_to_date(img)
        geometry = self.geometry(img, describe(img))
        return self.cut(img, Places(self.randomize(geometry, self.count(img)), geometry), lazy_)


class RandWeightedPatch(Randomizable, CountedPatchTransform):
    """Patches whose centers are drawn in proportion to a weight map.

    Channel 0 of the map counts. Weights are used as they are, in float64; a voxel of weight zero is never a center.

    Args:
        spatial_size: the patch's size, one int for all axes or one per axis; -1 is the whole axis.
        num_samples: how many patches, or a callable that is given the volume.
        on_empty: what to do if no legal center has a weight > 0: ``"raise"``, or take ``"uniform"`` patches.
        border: which voxels can be drawn. ``"inside"``: centers of patches that lie in the volume. ``"clamp"``: every
            voxel, and the patch is then moved inside. ``"pad"``: every voxel, and the patch may overhang.
        padding_mode: what lies outside the volume: a mode by torch's or numpy's name, or a number. With None a volume
            smaller than the patch is an error (``border="pad"``: zeros).
        lazy: leave the crop as a pending operation on a MetaTensor.

    >>> weights = np.zeros((1, 9, 9), dtype=np.float32)
    >>> weights[0, 4, 5] = 1
    >>> img = np.arange(81).reshape(1, 9, 9)
    >>> RandWeightedPatch(3)(img, weight_map=weights)[0][0, 1, 1] == img[0, 4, 5]
    np.True_
    """

    def __init__(
        self,
        spatial_size: Sequence[int] | int,
        num_samples: int | Callable[[Any], int] = 1,
        on_empty: str = "raise",
        border: str = "inside",
        padding_mode: Any = None,
        lazy: bool = False,
    ) -> None:
        CountedPatchTransform.__init__(self, spatial_size, num_samples, border, padding_mode, lazy)
        self.on_empty = check_choice("on_empty", on_empty, ON_EMPTY)

    def randomize(
        self,
        geometry: PatchGeometry,
        n: int,
        weight_map: Any = None,
        where: object = "weight map",
        made_before: Callable[[], WeightIndex | None] | None = None,
    ) -> np.ndarray:
        """Draw the starts of ``n`` patches; int64 of shape [n, axes].

        Args:
            geometry: the legal patches.
            n: how many.
            weight_map: channel-first, of the volume's spatial shape; None counts as a map of zeros.
            where: names the map in error messages.
            made_before: gives the map's index if there is one already.

        Raises:
            ValueError: if a weight is negative, NaN or infinite, the map has another shape, or nothing can be drawn.
        """
        if not n:
            return np.zeros((0, len(geometry.shape)), dtype=np.int64)
        drawn = None
        if weight_map is not None:
            guide = same_shape(weight_map, geometry, where)
            weights = FirstChannel(guide) if isinstance(guide, StoredVolume) else guide[0]
            try:
                source = guide.source if isinstance(guide, UnreadGuide) else None
                index = (made_before and made_before()) or index_weights(weights, source)
                drawn = index.draw(weights, geometry.box, n, self.R)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        if drawn is None:
            if self.on_empty == "raise":
                lacks = "is missing" if weight_map is None else no_center("no weight > 0", geometry)
                raise ValueError(f"{where}: {lacks}; {REMEDY}")
            drawn = geometry.draw_uniform(n, self.R)
        return geometry.starts(drawn)

    def __call__(self, img: Any, weight_map: Any = None, lazy: bool | None = None) -> list[Any]:
        """Take patches of a volume.

        Args:
            img: channel-first array, tensor, MetaTensor or lazily read volume, of shape [C, *spatial].
            weight_map: of shape [channels, *spatial]; channel 0 counts.
            lazy: overrides the constructor's ``lazy``.

        Returns:
            Copies, of the volume's type, dtype and order of axes in memory, each of shape [C, *patch].
        """
        if weight_map is None:
            raise ValueError(f"{describe(img)}: weight_map must be given")
        lazy_ = self.lazy if lazy is None else lazy
        img = img if lazy_ else up_to_date(img)
        geometry = self.geometry(img, describe(img))
        n = self.count(img)
        starts = self.randomize(geometry, n, weight_map, f"{describe(img)}, weight_map")
        return self.cut(img, Places(starts, geometry), lazy_)


class RandLabelPatch(Randomizable, CountedPatchTransform):
    """Patches whose centers lie on voxels of given classes.

    Args:
        spatial_size: the patch's size, one int for all axes or one per axis; -1 is the whole axis.
        num_samples: how many patches, or a callable that is given the volume.
        label_probabilities: how often each class is drawn, among the classes present at legal centers. A mapping from
            class (an int, or a string of one as JSON has it) to a probability of any sum, or a sequence indexed by
            class (MONAI's ``ratios``): a class first, then one of its voxels, uniformly; classes not named are never
            centers. None: every voxel > 0 equally likely. ``"balanced"``: every class > 0 equally likely. In a label
            of several channels a class is a channel's index, present where the channel is > 0; None then means any
            channel > 0 and ``"balanced"`` each channel.
        foreground_fraction: the share of a volume's patches that is drawn by label; the others are drawn uniformly.
            Exact after rounding; a remainder is drawn. None: all by label.
        ignore_label: a class whose voxels are never centers.
        on_empty: what to do if there is no such voxel among the legal centers: ``"raise"``, or take ``"uniform"``
            patches.
        border: which voxels can be drawn. ``"inside"``: centers of patches that lie in the volume. ``"clamp"``: every
            voxel, and the patch is then moved inside. ``"pad"``: every voxel, and the patch may overhang.
        padding_mode: what lies outside the volume: a mode by torch's or numpy's name, or a number. With None a volume
            smaller than the patch is an error (``border="pad"``: zeros).
        lazy: leave the crop as a pending operation on a MetaTensor.

    >>> label = np.zeros((1, 9, 9), dtype=np.uint8)
    >>> label[0, 3:6, 3:6] = 2
    >>> patches = RandLabelPatch(3, num_samples=4, label_probabilities={"2": 1})(label, label=label)
    >>> [int(patch[0, 1, 1]) for patch in patches]
    [2, 2, 2, 2]
    """

    def __init__(
        self,
        spatial_size: Sequence[int] | int,
        num_samples: int | Callable[[Any], int] = 1,
        label_probabilities: LabelProbabilities = None,
        foreground_fraction: float | None = None,
        ignore_label: int | None = None,
        on_empty: str = "raise",
        border: str = "inside",
        padding_mode: Any = None,
        lazy: bool = False,
    ) -> None:
        CountedPatchTransform.__init__(self, spatial_size, num_samples, border, padding_mode, lazy)
        self.label_probabilities = label_probabilities
        self.foreground_fraction = check_fraction(foreground_fraction)
        self.ignore_label = ignore_label
        self.on_empty = check_choice("on_empty", on_empty, ON_EMPTY)
        self._rule = check_rule(label_probabilities, ignore_label)

    @property
    def rules(self) -> list[LabelRule]:
        """The rules by which voxels are drawn from the label."""
        by_label = [] if self.foreground_fraction == 0 else [self._rule]
        uniform = [] if self.foreground_fraction in (None, 1) else [LabelRule("any", self._rule.ignore)]
        return by_label + [rule for rule in uniform if rule.ignore is not None]

    def randomize(
        self,
        geometry: PatchGeometry,
        n: int,
        label: Any = None,
        where: object = "label",
        made_before: Callable[[], LabelIndex | None] | None = None,
    ) -> np.ndarray:
        """Draw the starts of ``n`` patches; int64 of shape [n, axes].

        Args:
            geometry: the legal patches.
            n: how many.
            label: channel-first, of the volume's spatial shape; None counts as a label without classes.
            where: names the label in error messages.
            made_before: gives the label's index if there is one already.

        Raises:
            ValueError: if the label's shape is another one, or nothing can be drawn.
        """
        if not n:
            return np.zeros((0, len(geometry.shape)), dtype=np.int64)
        array = None if label is None else same_shape(label, geometry, where)
        index = None if array is None else index_label(array, made_before)
        by_label = n
        if self.foreground_fraction is not None:
            share = round(n * self.foreground_fraction, 9)
            by_label = int(share) + int(self.R.random_sample() < share - int(share))
        chosen = [
            self._draw(rule, m, geometry, array, index, where)
            for rule, m in ((self._rule, by_label), (LabelRule("any", self._rule.ignore), n - by_label))
            if m
        ]
        mixed = np.concatenate(chosen)[self.R.permutation(n)] if len(chosen) == 2 else chosen[0]
        return geometry.starts(mixed)

    def _draw(
        self,
        rule: LabelRule,
        n: int,
        geometry: PatchGeometry,
        label: np.ndarray | StoredVolume | UnreadGuide | None,
        index: LabelIndex | StoredLabelIndex | None,
        where: object,
    ) -> np.ndarray:
        if rule == LabelRule("any"):
            return geometry.draw_uniform(n, self.R)
        try:
            drawn = None if label is None or index is None else index.draw(label, geometry.box, rule, n, self.R)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if drawn is not None:
            return drawn
        if self.on_empty == "raise":
            raise ValueError(f"{where}: {self._emptiness(geometry, label, index)}; {REMEDY}")
        return geometry.draw_uniform(n, self.R)

    def _emptiness(self, geometry: PatchGeometry, label: Any, index: Any) -> str:
        if label is None or index is None:
            return "is missing"
        classes = self._rule.classes
        wanted = sorted(c for c, p in classes.items() if p > 0) if isinstance(classes, Mapping) else "greater than 0"
        ignored = "" if self._rule.ignore is None else f" (ignoring {self._rule.ignore})"
        found = index.counts(label, tuple((0, n) for n in geometry.shape))
        return (
            f"{no_center(f'no voxel of class {wanted}{ignored}', geometry)}; the whole label holds (class: voxels) "
            f"{ {c: found[c] for c in list(found)[:20]} }"
        )

    def __call__(self, img: Any, label: Any = None, lazy: bool | None = None) -> list[Any]:
        """Take patches of a volume.

        Args:
            img: channel-first array, tensor, MetaTensor or lazily read volume, of shape [C, *spatial].
            label: of shape [channels, *spatial].
            lazy: overrides the constructor's ``lazy``.

        Returns:
            Copies, of the volume's type, dtype and order of axes in memory, each of shape [C, *patch].
        """
        if label is None:
            raise ValueError(f"{describe(img)}: label must be given")
        lazy_ = self.lazy if lazy is None else lazy
        img = img if lazy_ else up_to_date(img)
        geometry = self.geometry(img, describe(img))
        n = self.count(img)
        starts = self.randomize(geometry, n, label, f"{describe(img)}, label")
        return self.cut(img, Places(starts, geometry), lazy_)


class GridPatchSamples(PatchTransform):
    """Every patch of a regular grid, in order, the last axis fastest; the last patch along an axis ends at the border.

    Args:
        spatial_size: the patch's size, one int for all axes or one per axis; -1 is the whole axis.
        overlap: what neighbours share: an int is a number of voxels, a float a fraction of the patch (as MONAI's
            ``SlidingWindowSplitter`` has it); one for all axes or one per axis.
        pad_overlap: begin and end the grid half an overlap outside the volume (as TorchIO's ``GridSampler``), so that
            with overlaps cropped away the whole volume remains covered.
        border: ``"pad"`` lets a volume be smaller than the patch; a grid's patches are inside in any case.
        padding_mode: what lies outside the volume: a mode by torch's or numpy's name, or a number; zeros for None. With
            None a volume smaller than the patch is an error.
        lazy: leave the crop as a pending operation on a MetaTensor.

    >>> grid = GridPatchSamples(4, overlap=0.5)
    >>> grid.count((10, 4)), len(grid(np.zeros((1, 10, 4))))
    (4, 4)
    """

    def __init__(
        self,
        spatial_size: Sequence[int] | int,
        overlap: float | Sequence[float] = 0,
        pad_overlap: bool = False,
        border: str = "inside",
        padding_mode: Any = None,
        lazy: bool = False,
    ) -> None:
        super().__init__(spatial_size, border, padding_mode, lazy)
        self.overlap = check_overlap(overlap)
        self.pad_overlap = bool(pad_overlap)
        sizes = self.spatial_size if isinstance(self.spatial_size, tuple) else (self.spatial_size,)
        if -1 not in sizes and (len(sizes) > 1 or not isinstance(self.overlap, tuple)):
            overlap_voxels(self.overlap, sizes)

    @property
    def requires_current_data(self) -> bool:
        """Whether pending operations must be applied before: where patches may be padded, voxels are needed."""
        return self.pad_overlap or super().requires_current_data

    def grid(self, shape: Sequence[int]) -> PatchGrid:
        """The grid over a volume of this spatial shape.

        Raises:
            ValueError: if the patch has another number of axes, or the overlap is not smaller than the patch.
        """
        size = resolve_size(self.spatial_size, shape)
        return PatchGrid(tuple(shape), size, overlap_voxels(self.overlap, size), self.pad_overlap)

    def count(self, shape: Sequence[int]) -> int:
        """How many patches a volume of this spatial shape gives; raises as :meth:`grid` does."""
        return self.grid(shape).count

    def __call__(self, img: Any, lazy: bool | None = None) -> list[Any]:
        """Take the grid's patches.

        Args:
            img: channel-first array, tensor, MetaTensor or lazily read volume, of shape [C, *spatial].
            lazy: overrides the constructor's ``lazy``.

        Returns:
            Copies, of the volume's type, dtype and order of axes in memory, each of shape [C, *patch].
        """
        lazy_ = self.lazy if lazy is None else lazy
        img = img if lazy_ else up_to_date(img)
        geometry = self.geometry(img, describe(img))
        return self.cut(img, Places(self.grid(geometry.shape).starts, geometry), lazy_)
