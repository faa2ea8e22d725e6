# SPDX-License-Identifier: Apache-2.0
"""Synthetic volumes that decode, compress and sample like scans: a noisy body in empty air, blobs of three classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm


def smooth_noise(shape: Sequence[int], spacing: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise on a grid of `spacing` voxels, interpolated to `shape`."""
    coarse = rng.standard_normal([max(2, size // spacing + 1) for size in shape], dtype=np.float32)
    fine = torch.nn.functional.interpolate(
        torch.from_numpy(coarse)[None, None], size=tuple(shape), mode="trilinear", align_corners=True
    )
    return fine[0, 0].numpy()


def make_volume(shape: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An int16 image and its uint8 label with classes 0 (background) to 3, each of them near the middle too."""
    rng = np.random.default_rng(seed)
    axes = [np.linspace(-1.0, 1.0, size, dtype=np.float32) for size in shape]
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij", sparse=True)))
    body = radius + 0.08 * smooth_noise(shape, 24, rng) < 0.9
    texture = smooth_noise(shape, 12, rng)
    label = np.zeros(shape, np.uint8)
    for class_, (spacing, threshold) in enumerate(((28, 1.0), (20, 1.2), (10, 1.5)), start=1):
        blobs = smooth_noise(shape, spacing, rng)
        blobs /= blobs.std()
        label[(blobs > threshold) & body] = class_
    middle = tuple(slice(size // 2 - 3, size // 2 + 3) for size in shape)
    label[middle] = rng.integers(1, 4, size=label[middle].shape)
    image = 40 + 60 * texture + 90 * label + 20 * rng.standard_normal(shape, dtype=np.float32)
    return np.where(body, image, 0).astype(np.int16), label


def write_volumes(folder: Path, count: int, shape: Sequence[int], suffix: str = ".nii.gz") -> list[dict[str, str]]:
    """Write `count` pairs of image and label, unless the same ones lie there already, and give their paths."""
    affine = np.array([[-0.8, 0, 0, 61.0], [0, 0.8, 0, -70.5], [0, 0, 1.25, -33.0], [0, 0, 0, 1]])
    size = "x".join(str(n) for n in shape)
    items = []
    for number in tqdm(range(count), desc=f"volumes of {size}", unit="volume", delay=2, leave=False):
        names = {key: folder / f"{size}_{number:03d}_{key}{suffix}" for key in ("image", "label")}
        if not all(path.exists() for path in names.values()):
            for path, array in zip(names.values(), make_volume(shape, seed=number), strict=True):
                unfinished = path.with_name(f"unfinished_{path.name}")
                nib.save(nib.Nifti1Image(array, affine), unfinished)
                unfinished.rename(path)
        items.append({key: str(path) for key, path in names.items()})
    return items
