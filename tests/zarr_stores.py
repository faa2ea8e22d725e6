# SPDX-License-Identifier: Apache-2.0
"""OME-Zarr images for tests, with metadata as the specifications have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

FORMATS = {"0.4": 2, "0.5": 3}
"""Versions of OME-Zarr, and the format of Zarr that each takes."""
KINDS = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


def axes(names: str, unit: str | None = "millimeter") -> list[dict[str, Any]]:
    """Axes called by letters; the unit is that of the spatial ones."""
    described = [{"name": name, "type": KINDS[name]} for name in names]
    return [{**axis, "unit": unit} if unit and axis["type"] == "space" else axis for axis in described]


def write_image(
    path: Path | str,
    array: np.ndarray,
    version: str = "0.5",
    *,
    names: str = "zyx",
    spacing: Sequence[float] | None = None,
    origin: Sequence[float] | None = None,
    chunk: int = 16,
    **metadata: Any,
) -> str:
    """Write an image of two levels, ``0`` and ``1``, of which the second has every other voxel; gives its path.

    Args:
        path: of the store, or of a group in it.
        array: the first level.
        version: of OME-Zarr.
        names: of the array's axes.
        spacing: between voxels of the first level, for each axis; None: 1.
        origin: of the first voxel, for each axis; None: 0.
        chunk: its length along spatial axes; it is 1 along others.
        metadata: more of the image's, or other ones.
    """
    image = zarr.open_group(str(path), mode="w", zarr_format=FORMATS[version])
    datasets = []
    for level, step in enumerate((1, 2)):
        steps = [step if KINDS[name] == "space" else 1 for name in names]
        part = array[tuple(slice(None, None, n) for n in steps)]
        chunks = [min(chunk, n) if KINDS[name] == "space" else 1 for name, n in zip(names, part.shape, strict=True)]
        image.create_array(str(level), shape=part.shape, dtype=part.dtype, chunks=chunks)[...] = part
        scale = [s * n for s, n in zip(spacing or [1.0] * len(names), steps, strict=True)]
        transformations = [
            {"type": "scale", "scale": scale},
            {"type": "translation", "translation": list(origin or [0.0] * len(names))},
        ]
        datasets.append({"path": str(level), "coordinateTransformations": transformations})
    described = {"axes": axes(names), "datasets": datasets, **metadata}
    if version == "0.4":
        image.attrs["multiscales"] = [{"version": version, **described}]
    else:
        image.attrs["ome"] = {"version": version, "multiscales": [described]}
    return str(path)
