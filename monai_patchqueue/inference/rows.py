# SPDX-License-Identifier: Apache-2.0
"""One volume under way: outputs of patches are blended, and rows are done as soon as no patch is missing there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..sampling import Box, PatchGrid

__all__ = ["BlendedRows"]


@dataclass
class _Band:
    """Neighbouring rows (along the first spatial axis) that the same layers of patches cover."""

    first: int
    stop: int
    missing: int
    values: torch.Tensor | None = None
    weights: torch.Tensor | None = None


class BlendedRows:
    """Sums up the outputs of a grid's patches, and gives rows along the first spatial axis as they are done.

    Patches may come in any order. In the grid's own order no more rows are held than a patch is high, whatever the
    size of the volume: a network's many channels need not be held for the whole volume.

    Args:
        grid: the volume's patches.
        weights: of a patch's voxels; None: each voxel is taken from one patch, which ends in the middle of overlaps.
        device: where the sums are made.
    """

    def __init__(self, grid: PatchGrid, weights: torch.Tensor | None, device: torch.device) -> None:
        self.grid = grid
        self._weights = weights
        self._device = device
        self._arrived = bytearray(grid.count)
        self._channels: int | None = None
        self._bands = self._divided()

    def missing(self) -> list[int]:
        """Numbers of the patches that have not been added."""
        return [patch for patch, arrived in enumerate(self._arrived) if not arrived]

    @property
    def complete(self) -> bool:
        """Whether all patches have been added."""
        return not self._bands

    def add(self, patch: int, output: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Add the output for a patch.

        Args:
            patch: its number.
            output: of shape [C, *size].

        Yields:
            Rows that are done: first row, the one after the last, and values of shape [C, rows, *other axes].

        Raises:
            ValueError: a patch that was added before, or an output of another shape.
        """
        if output.ndim != len(self.grid.size) + 1 or tuple(output.shape[1:]) != self.grid.size:
            raise ValueError(
                f"the output for a patch has shape {list(output.shape)}; expected channels and the patch's size "
                f"{list(self.grid.size)}"
            )
        self._channels = self._channels or len(output)
        if len(output) != self._channels:
            raise ValueError(f"the output for patch {patch} has {len(output)} channels; others had {self._channels}")
        if self._arrived[patch]:
            raise ValueError(f"patch {patch} of {self.grid.count} was added before")
        self._arrived[patch] = 1
        box = self._box(patch)
        start = self.grid.start(patch)
        within = tuple(slice(a - s, b - s) for (a, b), s in zip(box, start, strict=True))
        of_all_channels = (slice(None), *within)
        output = output.detach().to(self._device)[of_all_channels]
        weights = None if self._weights is None else self._weights[within]
        other = tuple(slice(a, b) for a, b in box[1:])
        top = box[0][0]
        for band in [band for band in self._bands if band.first < box[0][1] and top < band.stop]:
            rows = slice(band.first - top, band.stop - top)
            self._blend(band, other, output[:, rows], None if weights is None else weights[rows])
            band.missing -= 1
            if not band.missing:
                self._bands.remove(band)
                yield band.first, band.stop, self._finished(band)

    def _divided(self) -> list[_Band]:
        """Bands, cut wherever a patch begins or ends."""
        per_layer = self.grid.count // self.grid.steps[0]
        spans = [self._box(layer * per_layer)[0] for layer in range(self.grid.steps[0])]
        cuts = sorted({cut for span in spans for cut in span})
        return [
            _Band(first, stop, per_layer * sum(a <= first and stop <= b for a, b in spans))
            for first, stop in pairwise(cuts)
        ]

    def _box(self, patch: int) -> Box:
        return self.grid.cell(patch) if self._weights is None else self.grid.inside(patch)

    def _blend(self, band: _Band, other: tuple[slice, ...], output: torch.Tensor, weights: torch.Tensor | None) -> None:
        shape = (band.stop - band.first, *self.grid.shape[1:])
        rows = (slice(None), *other)
        values = (slice(None), *rows)
        if weights is None:
            if band.values is None:
                band.values = output.new_empty((len(output), *shape))
            band.values[values] = output
            return
        if band.values is None or band.weights is None:
            dtype = torch.promote_types(output.dtype, torch.float32)
            band.values = torch.zeros((len(output), *shape), dtype=dtype, device=self._device)
            band.weights = torch.zeros(shape, device=self._device)
        band.values[values] += output * weights
        band.weights[rows] += weights

    @staticmethod
    def _finished(band: _Band) -> torch.Tensor:
        if band.values is None:
            raise RuntimeError("a band without patches is done")
        return band.values if band.weights is None else band.values.div_(band.weights)
