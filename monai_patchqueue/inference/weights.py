# SPDX-License-Identifier: Apache-2.0
"""How much each voxel of a patch counts where patches overlap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.data.utils import compute_importance_map

__all__ = ["MODES", "blend_weights"]

MODES = ("constant", "average", "gaussian", "hann", "crop")


def blend_weights(mode: str, size: Sequence[int], sigma_scale: float | Sequence[float] = 0.125) -> torch.Tensor:
    """Weights of a patch's voxels, all greater than 0.

    Args:
        mode: ``"constant"`` (or ``"average"``) and ``"gaussian"`` as MONAI's ``SlidingWindowInferer`` has them,
            ``"hann"`` as TorchIO's ``GridAggregator``.
        size: the patch's size.
        sigma_scale: standard deviation of the Gaussian, as a fraction of the patch, for all axes or one per axis.

    Returns:
        float32 of shape ``size``.

    Example:
        >>> blend_weights("hann", (3,))
        tensor([0.5000, 1.0000, 0.5000])
    """
    if mode == "hann":
        weights = torch.ones(())
        for n in size:
            weights = weights[..., None] * torch.hann_window(n + 2, periodic=False)[1:-1]
        return weights
    blend = "gaussian" if mode == "gaussian" else "constant"
    importance: torch.Tensor = compute_importance_map(tuple(size), mode=blend, sigma_scale=sigma_scale)
    return importance
