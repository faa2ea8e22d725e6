# SPDX-License-Identifier: Apache-2.0
"""Where patches come from: geometry, weights, labels and grids, in plain numpy."""

from __future__ import annotations

from .geometry import BORDERS, Box, PatchGeometry, resolve_size
from .grid import PatchGrid, axis_starts, overlap_voxels
from .labels import LabelIndex, LabelRule
from .memory_order import as_array
from .regions import RunRegion
from .weights import WeightIndex

__all__ = [
    "BORDERS",
    "Box",
    "LabelIndex",
    "LabelRule",
    "PatchGeometry",
    "PatchGrid",
    "RunRegion",
    "WeightIndex",
    "as_array",
    "axis_starts",
    "overlap_voxels",
    "resolve_size",
]
