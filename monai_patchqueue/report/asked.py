# SPDX-License-Identifier: Apache-2.0
"""Which classes a pipeline was told to put at its patches' centers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monai.transforms import RandCropByLabelClasses, RandCropByPosNegLabel

from ..queue.seeding import reachable
from ..transforms import RandLabelPatch

__all__ = ["asked_shares"]


def asked_shares(dataset: Any, voxels: Mapping[int, float]) -> tuple[dict[int, float], str] | None:
    """The share of patches with each class at their center that a dataset's sampling transform was told to take.

    Classes that a volume lacks are never its centers, so the shares hold for volumes that have all of them.

    Args:
        dataset: a dataset whose transforms sample by a label map.
        voxels: the classes' shares of the label map's voxels.

    Returns:
        The shares by class, and what asks for them, in words; ``None`` where no transform samples by classes.
    """
    for found in reachable(dataset):
        if isinstance(found, RandLabelPatch):
            shares = _of_ours(found, voxels)
            return shares, f"label_probabilities={found.label_probabilities!r}"
        if isinstance(found, RandCropByLabelClasses):
            number = found.num_classes or max(voxels, default=0) + 1
            return _normalized(dict(enumerate(found.ratios or [1.0] * number))), f"ratios={found.ratios!r}"
        if isinstance(found, RandCropByPosNegLabel):
            background = _normalized({label: share for label, share in voxels.items() if label == 0})
            return (
                _mixed(_foreground(voxels), background, found.pos_ratio),
                f"pos / (pos + neg) = {found.pos_ratio:.2g}",
            )
    return None


def _of_ours(sampler: RandLabelPatch, voxels: Mapping[int, float]) -> dict[int, float]:
    probabilities = sampler.label_probabilities
    if probabilities is None:
        shares = _foreground(voxels)
    elif probabilities == "balanced":
        shares = _normalized({label: 1.0 for label in voxels if label > 0})
    elif isinstance(probabilities, Mapping):
        shares = _normalized({int(label): float(p) for label, p in probabilities.items()})
    else:
        shares = _normalized({label: float(p) for label, p in enumerate(probabilities)})
    fraction = sampler.foreground_fraction
    return shares if fraction is None else _mixed(shares, _normalized(dict(voxels)), fraction)


def _foreground(voxels: Mapping[int, float]) -> dict[int, float]:
    return _normalized({label: share for label, share in voxels.items() if label > 0})


def _normalized(shares: Mapping[int, float]) -> dict[int, float]:
    total = sum(shares.values()) or 1.0
    return {label: share / total for label, share in shares.items() if share > 0}


def _mixed(one: Mapping[int, float], other: Mapping[int, float], share: float) -> dict[int, float]:
    return {label: share * one.get(label, 0.0) + (1 - share) * other.get(label, 0.0) for label in {**one, **other}}
