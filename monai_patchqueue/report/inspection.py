# SPDX-License-Identifier: Apache-2.0
"""What a dataset's multi-sample transform takes of one volume: patches, where they are from, which classes they hit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from tqdm import tqdm

from ..data.volumes import gives_a_list, holder_of, volume_name
from ..queue.schedule import PREPARE, seed_sequence
from ..queue.seeding import Reseeder
from ..queue.timing import pipeline_stages

__all__ = ["ClassShares", "SampledVolume", "as_percent", "sample_volume"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ClassShares:
    """How often a class is met, as shares of 1.

    Attributes:
        value: the class.
        volume: of the volume's voxels.
        centers: of the patches' centers.
        patches: of the patches' voxels, before any augmentation.
        patches_with: of the patches, those that hold a voxel of it.
    """

    value: int
    volume: float
    centers: float
    patches: float
    patches_with: float


@dataclass(frozen=True)
class SampledVolume:
    """A volume and the patches that were taken of it.

    Attributes:
        name: of the volume.
        transform: name of the transform that took them.
        image: of shape [*spatial], the first channel.
        label: of shape [*spatial], or ``None``; of several channels, which of them is largest.
        spacing: of the voxels along each axis.
        starts: of the patches, of shape [n, axes]; negative where a patch begins in padding.
        size: of the patches, one number per axis.
        shown: image and label of the first patches, as they come out of the whole pipeline.
    """

    name: str
    transform: str
    image: Array
    label: Array | None
    spacing: tuple[float, ...]
    starts: Array
    size: tuple[int, ...]
    shown: tuple[tuple[Array, Array | None], ...]

    @property
    def short_name(self) -> str:
        """The volume's first file, without its folder, or its number."""
        file = self.name.partition("(")[2].partition(",")[0].rstrip(")")
        return os.path.basename(file) or self.name

    @property
    def centers(self) -> Array:
        """The patches' centers, of shape [n, axes]: start + size // 2."""
        centers: Array = self.starts + np.array(self.size) // 2
        return centers

    @property
    def center_classes(self) -> Array:
        """The class at each center; 0 in padding, and where there is no label."""
        return np.array([self._at(center) for center in self.centers], np.int64)

    def _at(self, center: Array) -> int:
        inside = all(0 <= place < length for place, length in zip(center, self.image.shape, strict=True))
        return int(self.label[tuple(center)]) if inside and self.label is not None else 0

    def classes(self) -> list[ClassShares]:
        """One row per class that the volume has; none without a label."""
        if self.label is None:
            return []
        values, counts = np.unique(self.label, return_counts=True)
        found = [np.unique(self._cut(start), return_counts=True) for start in self.starts]
        voxels = sum(int(n.sum()) for _, n in found) or 1
        hit = self.center_classes
        rows = []
        for value, count in zip(values, counts, strict=True):
            within = [int(n[v == value].sum()) for v, n in found]
            rows.append(
                ClassShares(
                    int(value),
                    float(count / self.label.size),
                    float((hit == value).mean()),
                    sum(within) / voxels,
                    float(np.mean([n > 0 for n in within])),
                )
            )
        return rows

    def _cut(self, start: Array) -> Array:
        window = tuple(slice(max(s, 0), max(s + n, 0)) for s, n in zip(start, self.size, strict=True))
        cut: Array = self.label[window] if self.label is not None else np.zeros(0)
        return cut

    def as_text(self) -> str:
        """A table of the classes."""
        size = " × ".join(map(str, self.size))
        lines = [
            f"{self.transform} took {len(self.starts)} patches of {size} voxels from {self.name}, of "
            f"{' × '.join(map(str, self.image.shape))} voxels."
        ]
        if self.label is not None:
            lines.append(
                f"{'class':>7}{'of the volume':>16}{'of centers':>13}{'of patches':>13}{'patches with it':>18}"
            )
        for row in self.classes():
            shares = (row.volume, row.centers, row.patches, row.patches_with)
            cells = [f"{as_percent(share)} %" for share in shares]
            lines.append(f"{row.value:>7}{cells[0]:>16}{cells[1]:>13}{cells[2]:>13}{cells[3]:>18}")
        return "\n".join(lines)


def as_percent(share: float) -> str:
    """A share of 1 in percent, small ones with their first digits.

    Example:
        >>> as_percent(0.814), as_percent(0.0000421), as_percent(0.0)
        ('81.4', '0.0042', '0')
    """
    percent = 100 * share
    return f"{percent:.1f}" if percent >= 1 else f"{percent:.2g}"


def sample_volume(
    dataset: Any,
    index: int = 0,
    *,
    patches: int = 200,
    shown: int = 12,
    seed: int = 0,
    image_key: str | None = None,
    label_key: str | None = None,
    progress: bool = True,
) -> SampledVolume:
    """Let a dataset's multi-sample transform take patches of one volume.

    Args:
        dataset: map-style, with a transform that ends in, or goes through, a multi-sample crop.
        index: of the volume.
        patches: how many to take at least; the transform is called as often as that needs.
        shown: how many of them to send through the rest of the pipeline.
        seed: of all randomness.
        image_key: of the image; by default the first key of the crop that is not the label's.
        label_key: of the label; by default as the crop has it, or ``"label"`` where it crops that.
        progress: show a progress bar.

    Raises:
        IndexError: a volume that is not there.
        ValueError: no such transform, a missing key, or patches that do not say where they are from.
    """
    if not 0 <= index < len(dataset):
        raise IndexError(f"there is no volume {index}: the dataset has {len(dataset)}, from 0.")
    holder, place = holder_of(dataset, index)
    stages = list(pipeline_stages(holder).values())
    places = [number for number, stage in enumerate(stages) if gives_a_list(stage)]
    if len(places) != 1 or not hasattr(holder, "data"):
        raise ValueError(
            f"{type(holder).__name__} has {len(places)} transforms that take several patches of a volume; one is "
            "needed to look at."
        )
    sampler = stages[places[0]]
    name = type(sampler).__name__
    lazy = getattr(getattr(holder, "transform", None), "lazy", False)
    before, after = Compose(stages[: places[0]], lazy=lazy), Compose(stages[places[0] + 1 :], lazy=lazy)
    Reseeder(holder)(seed_sequence(seed, PREPARE, 0, index, 0))  # after Compose, which gives its parts new state
    volume = before(holder.data[place])
    image_key, label_key = _keys(sampler, volume, image_key, label_key)
    taken: list[Any] = []
    with tqdm(total=patches, desc=f"patches of {name}", delay=1.0, disable=not progress, leave=False) as bar:
        while len(taken) < patches:
            more = sampler(volume)
            if not more:
                raise ValueError(f"{name} gives no patch of {volume_name(dataset, index)}.")
            taken += more
            bar.update(len(more))
    finished = [after(dict(patch)) for patch in taken[:shown]]
    image = volume[image_key]
    return SampledVolume(
        name=volume_name(dataset, index),
        transform=name,
        image=_plain(image)[0],
        label=_classes(volume[label_key]) if label_key else None,
        spacing=_spacing(image),
        starts=np.array([_start(patch[image_key], image, name) for patch in taken]),
        size=tuple(taken[0][image_key].shape[1:]),
        shown=tuple(
            (_plain(patch[image_key])[0], _classes(patch[label_key]) if label_key else None) for patch in finished
        ),
    )


def _keys(sampler: Any, volume: Mapping[str, Any], image: str | None, label: str | None) -> tuple[str, str | None]:
    keys = [str(key) for key in getattr(sampler, "keys", ())]
    if label is None:
        own = getattr(sampler, "label_key", None)
        label = own if own in keys else ("label" if "label" in keys else None)
    if image is None:
        image = next((key for key in keys if key != label), label)
    for option, key in (("image_key", image), ("label_key", label)):
        if key is not None and key not in keys:
            raise ValueError(f"--{option} {key}: {type(sampler).__name__} cuts {', '.join(keys)}.")
    if image is None or image not in volume:
        raise ValueError(f"the volume has no image: {type(sampler).__name__} cuts {', '.join(keys) or 'nothing'}.")
    return image, label


def _start(patch: Any, volume: Any, name: str) -> Array:
    """Where a patch begins, as its metadata says, or the difference of the affines."""
    location = getattr(patch, "meta", {}).get("patch_location")
    if location is not None:
        starts: Array = np.asarray(location).reshape(-1, 2)[:, 0]
        return starts
    if not isinstance(patch, MetaTensor) or not isinstance(volume, MetaTensor):
        raise ValueError(f"patches of {name} do not say where they are from: they have no metadata.")
    offset = np.linalg.solve(volume.affine.double().numpy(), patch.affine.double().numpy()[:, -1])
    whole: Array = np.rint(offset[: patch.ndim - 1]).astype(np.int64)
    return whole


def _spacing(image: Any) -> tuple[float, ...]:
    axes = image.ndim - 1
    affine: Array = image.affine.double().numpy() if isinstance(image, MetaTensor) else np.eye(axes)
    return tuple(float(length) for length in np.linalg.norm(affine[:axes, :axes], axis=0))


def _plain(value: Any) -> Array:
    array: Array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return array


def _classes(value: Any) -> Array:
    label = _plain(value)
    classes: Array = label[0].astype(np.int64) if len(label) == 1 else label.argmax(0)
    return classes
