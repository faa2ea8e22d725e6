# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms that give the patches of a volume; the array classes beside their dictionary versions."""

from __future__ import annotations

from ._base import PatchTransform as PatchTransform
from ._items import PatchTransformd as PatchTransformd
from ._reuse import ReusableIndex as ReusableIndex
from .array import GridPatchSamples, RandLabelPatch, RandUniformPatch, RandWeightedPatch
from .dictionary import (
    GridPatchSamplesD,
    GridPatchSamplesd,
    GridPatchSamplesDict,
    RandLabelPatchD,
    RandLabelPatchd,
    RandLabelPatchDict,
    RandUniformPatchD,
    RandUniformPatchd,
    RandUniformPatchDict,
    RandWeightedPatchD,
    RandWeightedPatchd,
    RandWeightedPatchDict,
)
from .index import LabelIndexD, LabelIndexd, LabelIndexDict, WeightIndexD, WeightIndexd, WeightIndexDict
from .load_volume import LoadVolume, LoadVolumeD, LoadVolumed, LoadVolumeDict

__all__ = [
    "GridPatchSamples",
    "GridPatchSamplesD",
    "GridPatchSamplesDict",
    "GridPatchSamplesd",
    "LabelIndexD",
    "LabelIndexDict",
    "LabelIndexd",
    "LoadVolume",
    "LoadVolumeD",
    "LoadVolumeDict",
    "LoadVolumed",
    "RandLabelPatch",
    "RandLabelPatchD",
    "RandLabelPatchDict",
    "RandLabelPatchd",
    "RandUniformPatch",
    "RandUniformPatchD",
    "RandUniformPatchDict",
    "RandUniformPatchd",
    "RandWeightedPatch",
    "RandWeightedPatchD",
    "RandWeightedPatchDict",
    "RandWeightedPatchd",
    "WeightIndexD",
    "WeightIndexDict",
    "WeightIndexd",
]
