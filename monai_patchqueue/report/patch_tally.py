# SPDX-License-Identifier: Apache-2.0
"""What the patches of a run show: which class lies at their centers, and how many have any foreground."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from .traces import centers

__all__ = ["PatchTally", "label_of"]

# Batches on a GPU are looked at there; waiting for the result of each would hold up the training.
_PENDING = 16
# Most patches with foreground show it at their center, or in every eighth voxel along each axis.
_COARSE = 8


class PatchTally:
    """Counts patches by the class at their center, and those with foreground.

    The center is the voxel that was it when the patch was cut, wherever flips have moved it since; what other spatial
    augmentation does is not followed. Where the label has one channel, the classes are its values, and voxels above 0
    are foreground. Of several channels, each that is above 0 at the center counts, under its number, and channel 0 is
    no foreground, as MONAI's crops take it.

    Args:
        label_key: where a batch has its label, [B, C, *spatial].

    Example:
        >>> tally = PatchTally("label")
        >>> tally.add({"label": torch.tensor([[[0, 2, 1]], [[3, 0, 0]], [[0, 0, 0]]])})
        >>> dict(tally.centers), tally.foreground_share
        ({2: 1, 0: 2}, 0.666...)
    """

    def __init__(self, label_key: str) -> None:
        self.label_key = label_key
        self._centers: Counter[int] = Counter()
        self._patches = 0
        self._foreground = 0
        self.last_foreground_share = 0.0
        self.last_centers: Sequence[int | None] = ()
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, batch: Any) -> None:
        """Take note of a batch.

        Raises:
            KeyError: a batch without the label.
            ValueError: a label without spatial axes.
        """
        label = label_of(batch, self.label_key)
        places = centers(batch[self.label_key], label.shape[2:])
        if label.device.type == "cpu" and label.dtype != torch.bfloat16:
            array = label.numpy()
            found = [_classes(voxel) for voxel in _voxels(array, places)]
            self.last_centers = [labels[0] if labels else None for labels in found]
            self._count_centers(found)
            self._count_foreground(_with_foreground(array, found))
        else:
            self.last_centers = [None] * len(places)
            foreground = (label[:, int(label.shape[1] > 1) :] > 0).flatten(1).any(1)
            self._pending.append((torch.stack(_voxels(label, places)).float(), foreground))
            if len(self._pending) > _PENDING:
                self.settle()

    def settle(self) -> None:
        """Count what was looked at on a GPU, which may have to be waited for."""
        for voxels, foreground in self._pending:
            self._count_centers(map(_classes, voxels.cpu().numpy()))
            self._count_foreground(foreground.tolist())
        self._pending.clear()

    def _count_centers(self, found: Iterable[Sequence[int]]) -> None:
        """Add the classes at the center of each of a batch's patches."""
        for label in chain.from_iterable(found):
            self._centers[label] += 1

    def _count_foreground(self, found: Sequence[bool]) -> None:
        """Add which of a batch's patches have foreground."""
        self._patches += len(found)
        self._foreground += sum(found)
        self.last_foreground_share = sum(found) / len(found)

    @property
    def centers(self) -> Mapping[int, int]:
        """Patches by the class at their center."""
        self.settle()
        return self._centers

    @property
    def foreground_share(self) -> float:
        """Share of the patches that have foreground."""
        self.settle()
        return self._share()

    def _share(self) -> float:
        return self._foreground / self._patches if self._patches else 0.0

    def scalars(self) -> dict[str, float]:
        """The figures as flat scalars; where batches are on a GPU they lag some behind, until :meth:`settle`."""
        return {
            "foreground_share": self._share(),
            "last_foreground_share": self.last_foreground_share,
            **{f"centers_{label}": float(count) for label, count in self._centers.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """The counts, as plain values."""
        return {"centers": dict(self.centers), "patches": self._patches, "foreground": self._foreground}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the counts of ``state``."""
        self._pending.clear()
        self._centers = Counter(state["centers"])
        self._patches, self._foreground = state["patches"], state["foreground"]


def label_of(batch: Any, label_key: str) -> torch.Tensor:
    """A batch's label map as a plain tensor, [B, C, *spatial].

    Raises:
        KeyError: a batch without it.
        ValueError: a label without spatial axes.
    """
    label = batch.get(label_key) if isinstance(batch, Mapping) else None
    if not isinstance(label, torch.Tensor):
        keys = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise KeyError(f"label_key={label_key!r}: the batch has no tensor of that name. Found: {keys}.")
    with torch._C.DisableTorchFunctionSubclass():  # a MetaTensor makes long work of everything
        label = label.as_subclass(torch.Tensor)
    if label.requires_grad:
        label = label.detach()
    if label.ndim < 3:
        raise ValueError(f"label_key={label_key!r}: expected [B, C, *spatial], found {tuple(label.shape)}.")
    return label


def _voxels(patches: Any, places: Sequence[tuple[int, ...]]) -> list[Any]:
    """A voxel of each patch, [C]."""
    indices = ((slice(None), *place) for place in places)
    return [patch[index] for patch, index in zip(patches, indices, strict=True)]


def _classes(voxel: np.ndarray[Any, Any]) -> list[int]:
    """The classes at a voxel, [C]."""
    return [int(voxel[0])] if len(voxel) == 1 else np.flatnonzero(voxel > 0).tolist()


def _with_foreground(label: np.ndarray[Any, Any], centers: Sequence[Sequence[int]]) -> list[bool]:
    """Which patches have foreground; only those that show none at a glance are looked through."""
    found = [bool(labels) and labels[-1] > 0 for labels in centers]
    if not all(found):
        label = label[:, int(label.shape[1] > 1) :]
        lattice: Any = (slice(None), slice(None), *(slice(s // 2 % _COARSE, None, _COARSE) for s in label.shape[2:]))
        most = label[lattice].reshape(len(label), -1).max(1, initial=0).tolist()
        found = [known or most[patch] > 0 or bool(label[patch].max() > 0) for patch, known in enumerate(found)]
    return found
