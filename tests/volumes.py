# SPDX-License-Identifier: Apache-2.0
"""Small volumes for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.data import MetaTensor


def numbered(*shape: int, channels: int = 1) -> np.ndarray:
    """A channel-first int32 volume whose voxels hold their own number, from 1: a patch says where it is from."""
    return np.arange(1, channels * int(np.prod(shape)) + 1, dtype=np.int32).reshape(channels, *shape)


def blobs(*shape: int, classes: int = 3, seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    """A channel-first label of background and balls of the classes 1 … classes."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, dtype=dtype)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    for value in range(1, classes + 1):
        center = [rng.uniform(0.2, 0.8) * n for n in shape]
        label[((grid - center) ** 2).sum(-1) <= (min(shape) / 5) ** 2] = value
    return label[None]


def meta(volume: np.ndarray, file: str = "case.nii.gz", spacing: Sequence[float] = (2, 3, 4)) -> MetaTensor:
    """A volume as LoadImage gives it: with a file name, an affine, and (as NIfTI) the last axis slowest in memory."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (10, -20, 5)
    slow_last = torch.from_numpy(np.ascontiguousarray(volume.T)).permute(*reversed(range(volume.ndim)))
    return MetaTensor(slow_last, affine=affine, meta={"filename_or_obj": file})
