# SPDX-License-Identifier: Apache-2.0
"""Where in the volumes patches were taken, and what lies there on average."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .traces import Box, boxes

__all__ = ["PatchMap"]

# So many patches of a batch go into the mean volume, and so many cells of each: about half a millisecond.
_PASTED = 4
_CELLS = 3000


class PatchMap:
    """Centers of patches, and a mean volume that is put together from them, all relative to the volumes' shapes.

    Of all centers, so many are kept that each had the same chance. The mean volume gets some patches of each batch,
    such as no flip or rotation has moved since they were cut.

    Args:
        size: cells of the mean volume along each axis.
        most: centers that are kept.
    """

    def __init__(self, size: int = 56, most: int = 3000) -> None:
        self._size = size
        self._most = most
        self._rng = np.random.default_rng(0)
        self.seen = 0
        self.centers: list[tuple[tuple[float, ...], int | None]] = []
        self.total: np.ndarray[Any, Any] | None = None
        self.times: np.ndarray[Any, Any] | None = None

    def add(self, patches: torch.Tensor, classes: Sequence[int | None]) -> None:
        """Take note of a batch.

        Args:
            patches: [B, C, *spatial].
            classes: the class at each patch's center, where it is known.
        """
        chosen: list[tuple[int, Box]] = []
        plain = patches.as_subclass(torch.Tensor).detach()
        shape = plain.shape[2:]
        for index, box in enumerate(boxes(patches)):
            if box is not None:
                if box.as_it_was and len(chosen) < _PASTED:
                    chosen.append((index, box))
                places = zip(box.start, shape, box.volume, strict=True)
                self._keep(tuple((a + n // 2 + 0.5) / whole for a, n, whole in places), classes[index])
        for index, box in chosen:
            self._paste(plain[index, 0], box)

    def _keep(self, center: tuple[float, ...], label: int | None) -> None:
        self.seen += 1
        if len(self.centers) < self._most:
            self.centers.append((center, label))
        elif self._rng.random() < self._most / self.seen:
            self.centers[int(self._rng.integers(self._most))] = center, label

    def _paste(self, patch: torch.Tensor, box: Box) -> None:
        if self.total is None or self.times is None or self.total.ndim != patch.ndim:
            self.total = np.zeros((self._size,) * patch.ndim, np.float32)
            self.times = np.zeros(self.total.shape, np.uint32)
        shares = [extent / whole for extent, whole in zip(patch.shape, box.volume, strict=True)]
        # Of a large patch only every so many cells along each axis, others each time.
        stride = max(1, math.ceil((math.prod(shares) / _CELLS) ** (1 / patch.ndim) * self._size))
        cells, voxels = [], []
        for start, extent, whole in zip(box.start, patch.shape, box.volume, strict=True):
            places = (np.arange(self._size) + 0.5) * whole / self._size - start
            inside = np.flatnonzero((places >= 0) & (places < extent))[int(self._rng.integers(stride)) :: stride]
            cells.append(slice(int(inside[0]), int(inside[-1]) + 1, stride) if len(inside) else slice(0, 0))
            voxels.append(torch.from_numpy(places[inside].astype(np.int64)))
        self.total[tuple(cells)] += patch[torch.meshgrid(*voxels, indexing="ij")].float().cpu().numpy()
        self.times[tuple(cells)] += 1

    def projection(self, axis: int) -> np.ndarray[Any, Any] | None:
        """The mean volume, averaged along an axis; NaN where no patch was."""
        if self.total is None or self.times is None:
            return None
        seen = self.times > 0
        mean = np.divide(self.total, self.times, out=np.zeros_like(self.total), where=seen)
        if mean.ndim > 2:
            mean, seen = mean.sum(axis), seen.sum(axis)
        return np.asarray(np.where(seen > 0, mean / np.maximum(seen, 1), np.nan))

    def state_dict(self) -> dict[str, Any]:
        """Centers and mean volume, as plain values and tensors."""
        state: dict[str, Any] = {"seen": self.seen, "centers": [[list(place), label] for place, label in self.centers]}
        if self.total is not None and self.times is not None:
            state["total"], state["times"] = torch.from_numpy(self.total), torch.from_numpy(self.times.astype(np.int64))
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.seen = state["seen"]
        self.centers = [(tuple(place), label) for place, label in state["centers"]]
        if "total" in state:
            self.total, self.times = state["total"].numpy().copy(), state["times"].numpy().astype(np.uint32)
