# SPDX-License-Identifier: Apache-2.0
"""What the patches of a run show: which class lies at their centers, and how many have any foreground."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .traces import centers

__all__ = ["PatchTally", "label_of"]

# Batches on a GPU are looked at there; waiting for the result of each would hold up the training.
_PENDING = 16
# Most patches with foreground show it in every eighth voxel along each axis, the center among them.
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
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    #: The class at the center of each of the last batch's patches, where that is one and at hand without waiting.
    last_centers: Sequence[int | None] = ()

    def add(self, batch: Any) -> None:
        """Take note of a batch.

        Raises:
            KeyError: a batch without the label.
            ValueError: a label without spatial axes.
        """
        label = label_of(batch, self.label_key)
        center: Any = (range(len(label)), slice(None), *map(list, zip(*centers(batch[self.label_key]), strict=True)))
        if label.device.type == "cpu" and label.dtype != torch.bfloat16:
            array = label.numpy()
            voxels = array[center]
            self._count(voxels, _with_foreground(array))
            self.last_centers = _one_each(voxels)
        else:
            foreground = (label[:, int(label.shape[1] > 1) :] > 0).flatten(1).any(1)
            self.last_centers = [None] * len(label)
            self._pending.append((label[center].float(), foreground))
            if len(self._pending) > _PENDING:
                self._settle()

    def _settle(self) -> None:
        for voxels, foreground in self._pending:
            self._count(voxels.cpu().numpy(), foreground.cpu().numpy())
        self._pending.clear()

    def _count(self, centers: np.ndarray[Any, Any], foreground: np.ndarray[Any, Any]) -> None:
        """Add a batch's center voxels, [B, C], and which of its patches have foreground."""
        if centers.shape[1] == 1:
            self._centers.update(map(int, centers[:, 0].tolist()))
        else:
            self._centers.update(np.nonzero(centers > 0)[1].tolist())
        found = int(foreground.sum())
        self._patches += len(foreground)
        self._foreground += found
        self.last_foreground_share = found / len(foreground)

    @property
    def centers(self) -> Mapping[int, int]:
        """Patches by the class at their center."""
        self._settle()
        return self._centers

    @property
    def foreground_share(self) -> float:
        """Share of all patches that have foreground."""
        self._settle()
        return self._share()

    def _share(self) -> float:
        return self._foreground / self._patches if self._patches else 0.0

    def scalars(self) -> dict[str, float]:
        """The figures as flat scalars; on a GPU they lag some batches behind."""
        counts = {f"centers_{label}": float(count) for label, count in sorted(self._centers.items())}
        return {
            "foreground_share": self.foreground_share,
            "last_foreground_share": self.last_foreground_share,
            **counts,
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
    label = label.as_subclass(torch.Tensor).detach()  # a MetaTensor's own properties are slow
    if label.ndim < 3:
        raise ValueError(f"label_key={label_key!r}: expected [B, C, *spatial], found {tuple(label.shape)}.")
    return label


def _one_each(centers: np.ndarray[Any, Any]) -> list[int | None]:
    if centers.shape[1] == 1:
        return [int(value) for value in centers[:, 0].tolist()]
    return [int(np.argmax(channels > 0)) if (channels > 0).any() else None for channels in centers]


def _with_foreground(label: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Which patches have foreground; only those that show none in a coarse look are looked through."""
    if label.shape[1] > 1:
        label = label[:, 1:]
    coarse: Any = (slice(None), slice(None), *(slice(size // 2 % _COARSE, None, _COARSE) for size in label.shape[2:]))
    found: np.ndarray[Any, Any] = label[coarse].reshape(len(label), -1).max(1, initial=0) > 0
    for patch in np.flatnonzero(~found):
        found[patch] = label[patch].max() > 0
    return found
