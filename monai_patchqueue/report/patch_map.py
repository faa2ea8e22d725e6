# SPDX-License-Identifier: Apache-2.0
"""Where in the volumes patches were taken, and what lies there on average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import TraceKeys

__all__ = ["Box", "PatchMap", "boxes"]


class Box(NamedTuple):
    """A patch's place: where it starts, in a volume of which shape, and whether its voxels lie as they did there."""

    start: tuple[int, ...]
    volume: tuple[int, ...]
    as_it_was: bool


def boxes(patches: Any) -> list[Box | None]:
    """Where the patches of a batch were cut, as their traces say.

    Args:
        patches: [B, C, *spatial], as MONAI's ``list_data_collate`` makes it.

    Returns:
        By patch: its place, or ``None`` where its trace has no crop to its shape.
    """
    if not isinstance(patches, MetaTensor):
        return [None] * len(patches)
    shape = tuple(patches.shape[2:])
    return [_box(trace, shape) for trace in patches.applied_operations]


def _box(trace: Any, shape: tuple[int, ...]) -> Box | None:
    as_it_was = True
    for operation in reversed(trace if isinstance(trace, Sequence) else ()):
        for info in _infos(operation):
            cut, volume = info.get("cropped"), operation.get(TraceKeys.ORIG_SIZE)
            if cut is not None and volume is not None and len(cut) == 2 * len(volume):
                start = tuple(int(n) for n in cut[::2])
                size = tuple(int(n) - a - int(b) for n, a, b in zip(volume, start, cut[1::2], strict=True))
                if size == shape:
                    return Box(start, tuple(int(n) for n in volume), as_it_was)
        as_it_was &= not operation.get(TraceKeys.DO_TRANSFORM, True)
    return None


def _infos(operation: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What an operation's trace and those nested in it say beyond their names."""
    info = operation.get(TraceKeys.EXTRA_INFO)
    while isinstance(info, Mapping):
        yield info
        info = info.get(TraceKeys.EXTRA_INFO)


class PatchMap:
    """Centers of patches, and a mean volume that is put together from them, all relative to the volumes' shapes.

    Of all centers, so many are kept that each had the same chance. The mean volume gets one patch of each batch, such
    as no flip or rotation has moved since it was cut.

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
        chosen = None
        shape = patches.shape[2:]
        for index, box in enumerate(boxes(patches)):
            if box is not None:
                if chosen is None and box.as_it_was:
                    chosen = index, box
                places = zip(box.start, shape, box.volume, strict=True)
                self._keep(tuple((a + n // 2 + 0.5) / whole for a, n, whole in places), classes[index])
        if chosen is not None:
            self._paste(patches[chosen[0], 0].detach().as_subclass(torch.Tensor), chosen[1])

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
        cells, voxels = [], []
        for start, extent, whole in zip(box.start, patch.shape, box.volume, strict=True):
            places = (np.arange(self._size) + 0.5) * whole / self._size - start
            inside = np.flatnonzero((places >= 0) & (places < extent))
            cells.append(slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0))
            voxels.append(torch.from_numpy(places[inside].astype(np.int64)))
        for axis, index in enumerate(voxels):
            patch = patch.index_select(axis, index.to(patch.device))
        self.total[tuple(cells)] += patch.float().cpu().numpy()
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
