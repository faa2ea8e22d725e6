# SPDX-License-Identifier: Apache-2.0
"""A small segmentation data set made from nothing but a seed, for examples, tests and the bundle's first run."""

from __future__ import annotations

import getpass
import gzip
import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

__all__ = ["SYNTHETIC_LABELS", "make_synthetic_dataset", "synthetic_volume"]

logger = logging.getLogger(__name__)

SYNTHETIC_LABELS = {0: "background", 1: "grainy organ", 2: "layered organ", 3: "lesion"}
"""What the label values of the synthetic volumes stand for."""

# Part of the cache key: raise it whenever a change below alters a voxel, so that no one trains on stale files.
_FORMAT_VERSION = 2
_SPACING_MM = (1.5, 1.2, 2.0)
_LESIONS = 3
_DISTRACTORS = 18

FloatVolume = npt.NDArray[np.float64]


def make_synthetic_dataset(
    folder: str | os.PathLike[str] | None = None,
    *,
    num_volumes: int = 10,
    shape: Sequence[int] = (80, 72, 64),
    seed: int = 0,
    progress: bool = True,
) -> str:
    """Write a data set in the Medical Segmentation Decathlon's layout, once, and return its folder.

    The folder holds ``dataset.json``, ``imagesTr`` (int16), ``labelsTr`` (uint8; see :data:`SYNTHETIC_LABELS`) and
    ``weightsTr`` (uint8 sampling weights, highest in the organs). What a volume shows is described in
    :func:`synthetic_volume`. The same arguments give the same files, byte for byte.

    The files are written to a folder beside the target, which is then renamed: a folder that is there is complete,
    and several processes may ask for the same one at once. A complete one is used again.

    Args:
        folder: where to write. ``None``: a folder of this user's under the system's temporary folder, named after the
            arguments.
        num_volumes: number of volumes, all with labels.
        shape: voxels along each of the three axes, at least 32 each.
        seed: the only source of randomness.
        progress: show a progress bar if writing takes more than two seconds.

    Returns:
        The folder's path, to be given as ``dataset_dir``.

    Raises:
        FileExistsError: if ``folder`` holds something else.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     folder = make_synthetic_dataset(Path(parent) / "data", num_volumes=2, shape=(32, 32, 32))
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['dataset.json', 'imagesTr', 'labelsTr', 'weightsTr']
    """
    size = tuple(int(n) for n in shape)
    if len(size) != 3 or min(size) < 32:
        raise ValueError(f"shape: expected three numbers of at least 32, got {tuple(shape)}.")
    if num_volumes < 1:
        raise ValueError(f"num_volumes: expected at least 1, got {num_volumes}.")
    recipe = {"version": _FORMAT_VERSION, "num_volumes": int(num_volumes), "shape": list(size), "seed": int(seed)}
    target = _cache_folder(recipe) if folder is None else Path(folder).absolute()
    if _is_complete(target, recipe):
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if folder is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} holds something else than the data set asked for: name a folder of its own.")

    written = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        logger.info("writing %d synthetic volumes to %s", num_volumes, target)
        _write(written, recipe, progress)
        _move_into_place(written, target, recipe, replace=folder is None)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return str(target)


def synthetic_volume(
    shape: Sequence[int], seed: int = 0, index: int = 0
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8], npt.NDArray[np.uint8], FloatVolume]:
    """Make one volume: image, label, sampling weights and affine.

    Intensity alone tells nothing: background, the grainy organ (1) and the layered organ (2) have the same mean and
    spread and differ in texture only, a bias field runs over everything, and the bright spots that are lesions
    (3, less than one voxel in a thousand) within the grainy organ are outnumbered by equal ones elsewhere. The
    affine has anisotropic voxels, flipped axes and a rotation.

    Args:
        shape: voxels along each of the three axes.
        seed: the data set's seed.
        index: which of its volumes.

    Returns:
        ``(image, label, weights, affine)``.

    Example:
        >>> image, label, weights, affine = synthetic_volume((32, 32, 32))
        >>> image.shape, str(image.dtype), label.max(), affine.shape
        ((32, 32, 32), 'int16', np.uint8(3), (4, 4))
    """
    rng = np.random.default_rng([seed, index])
    size = (int(shape[0]), int(shape[1]), int(shape[2]))
    voxels = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in size), indexing="ij")
    grid = np.meshgrid(*(np.linspace(-1.0, 1.0, n) for n in size), indexing="ij")

    wobble = 0.2 * _smooth_noise(rng, size, 5.0)
    # The organs lie in opposite halves along the first axis, in either order.
    side = 1.0 if rng.random() < 0.5 else -1.0
    grainy = _ellipsoid(rng, grid, side) + wobble < 1
    layered = (_ellipsoid(rng, grid, -side) + wobble < 1) & ~grainy
    label = np.zeros(size, dtype=np.uint8)
    label[grainy] = 1
    label[layered] = 2

    # Layers are concentric, so that each volume shows them in every direction.
    middle = np.argwhere(layered).mean(axis=0)
    distance = np.sqrt(np.sum([(axis - m) ** 2 for axis, m in zip(voxels, middle, strict=True)], axis=0))
    layers = np.sqrt(2) * np.sin(2 * np.pi * distance / 5.0 + rng.uniform(0, 2 * np.pi))
    texture = _smooth_noise(rng, size, 4.0)
    texture = np.where(grainy, _smooth_noise(rng, size, 0.6), texture)
    texture = np.where(layered, layers, texture)

    inner = _ball_fits(grainy, 4)
    spots = _draw_spots(rng, voxels, inner, _LESIONS)
    label[spots & grainy] = 3
    spots |= _draw_spots(rng, voxels, ~grainy, _DISTRACTORS) & ~grainy
    texture = np.where(spots, 3.0, texture)

    bias = np.exp(0.2 * _smooth_noise(rng, size, max(size) / 4))
    image = bias * (500.0 + 120.0 * texture + rng.normal(0.0, 15.0, size))
    organs = _gaussian((label > 0).astype(np.float64), 2.0)
    weights = np.rint(255 * np.clip(organs, 0, 1)).astype(np.uint8)
    return np.clip(np.rint(image), -32768, 32767).astype(np.int16), label, weights, _affine(rng)


def _gaussian(volume: FloatVolume, sigma: float) -> FloatVolume:
    """Periodic Gaussian filter; by Fourier transform, since SciPy is no dependency."""
    shape = volume.shape
    frequencies = [np.fft.fftfreq(n) for n in shape[:-1]] + [np.fft.rfftfreq(shape[-1])]
    spectrum = np.fft.rfftn(volume)
    for axis, f in enumerate(frequencies):
        response = np.exp(-2.0 * (np.pi * sigma * f) ** 2)
        spectrum *= response.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    filtered: FloatVolume = np.fft.irfftn(spectrum, s=shape, axes=range(len(shape)))
    return filtered


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, int, int], sigma: float) -> FloatVolume:
    """Gaussian noise of correlation length ``sigma`` voxels, mean 0 and standard deviation 1."""
    noise = _gaussian(rng.normal(size=shape), sigma)
    standardized: FloatVolume = (noise - noise.mean()) / noise.std()
    return standardized


def _ellipsoid(rng: np.random.Generator, grid: Sequence[FloatVolume], side: float) -> FloatVolume:
    """Distance from a random center, in radii."""
    center = np.array([0.45 * side, 0.0, 0.0]) + rng.uniform(-0.1, 0.1, 3)
    radii = rng.uniform([0.38, 0.5, 0.5], [0.46, 0.65, 0.65])
    squares = [((axis - c) / r) ** 2 for axis, c, r in zip(grid, center, radii, strict=True)]
    distance: FloatVolume = np.sqrt(np.sum(squares, axis=0))
    return distance


def _ball_fits(mask: npt.NDArray[np.bool_], radius: int) -> npt.NDArray[np.bool_]:
    """Voxels at least about ``radius`` voxels away from everything outside the mask (city-block erosion)."""
    fits = np.pad(mask, 1)
    for _ in range(radius):
        core = fits.copy()
        for axis in range(mask.ndim):
            core &= np.roll(fits, 1, axis) & np.roll(fits, -1, axis)
        fits = core
    return fits[tuple(slice(1, -1) for _ in range(mask.ndim))]


def _draw_spots(
    rng: np.random.Generator, voxels: Sequence[FloatVolume], allowed: npt.NDArray[np.bool_], count: int
) -> npt.NDArray[np.bool_]:
    """Balls of about two voxels' radius around ``count`` centers drawn from the allowed voxels."""
    spots = np.zeros(allowed.shape, dtype=bool)
    candidates = np.flatnonzero(allowed)
    if candidates.size == 0:
        return spots
    for flat in rng.choice(candidates, count):
        center = np.unravel_index(flat, allowed.shape)
        radius = rng.uniform(1.8, 2.6)
        spots |= sum((axis - c) ** 2 for axis, c in zip(voxels, center, strict=True)) <= radius**2
    return spots


def _affine(rng: np.random.Generator) -> FloatVolume:
    """Left-posterior-superior axes with anisotropic voxels, turned a few degrees and shifted."""
    angle = np.deg2rad(rng.uniform(-8, 8))
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(np.array([-1.0, -1.0, 1.0]) * _SPACING_MM)
    affine[:3, 3] = rng.uniform(-60, 60, 3)
    return affine


def _cache_folder(recipe: dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = "user"
    return Path(tempfile.gettempdir()) / f"monai_patchqueue-{user}" / f"synthetic-{key}"


def _is_complete(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether the folder holds this very data set; cleaners of temporary folders remove single files."""
    try:
        description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        return description["recipe"] == recipe and all(
            (folder / path).is_file() for item in description["training"] for path in item.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write(folder: Path, recipe: dict[str, Any], progress: bool) -> None:
    training = []
    for index in tqdm(range(recipe["num_volumes"]), desc="synthetic volumes", delay=2.0, disable=not progress):
        image, label, weights, affine = synthetic_volume(recipe["shape"], recipe["seed"], index)
        item = {}
        for key, array in (("image", image), ("label", label), ("weight", weights)):
            item[key] = f"./{key}sTr/volume_{index:03d}.nii.gz"
            path = folder / item[key]
            path.parent.mkdir(parents=True, exist_ok=True)
            volume = nib.Nifti1Image(array, affine)
            volume.header.set_xyzt_units("mm")
            # mtime=0: the same arguments give the same bytes. Level 1: noise does not compress any better.
            path.write_bytes(gzip.compress(volume.to_bytes(), compresslevel=1, mtime=0))
        training.append(item)
    description = {
        "name": "monai_patchqueue synthetic",
        "description": "Organs that differ from the background in texture only, with rare lesions; made from a seed",
        "reference": "monai_patchqueue.data.synthetic",
        "licence": "Apache-2.0",
        "tensorImageSize": "3D",
        "modality": {"0": "synthetic"},
        "labels": {str(value): name for value, name in SYNTHETIC_LABELS.items()},
        "numTraining": len(training),
        "numTest": 0,
        "training": training,
        "test": [],
        "recipe": recipe,
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _move_into_place(written: Path, target: Path, recipe: dict[str, Any], replace: bool) -> None:
    """Rename a finished folder, unless another process was faster; in the cache, replace one that has lost files."""
    try:
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()  # Windows renames onto nothing, not even onto an empty folder
        written.rename(target)
    except OSError:
        if _is_complete(target, recipe):
            return
        if not replace:
            raise
        damaged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        target.rename(damaged)
        try:
            _move_into_place(written, target, recipe, replace)
        finally:
            shutil.rmtree(damaged, ignore_errors=True)
