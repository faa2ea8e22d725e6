# SPDX-License-Identifier: Apache-2.0
"""Volumes in Zarr stores, plain arrays or OME-Zarr images, of which the chunks that a patch touches are read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .ngff import Layout, axes_in_order, image_layout, multiscales_of

__all__ = ["ZarrArray", "ZarrVolume", "import_zarr", "is_zarr", "metadata_above", "open_zarr"]

METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
"""Files with a node's metadata, in Zarr 3 (the first) and 2."""
_NAMES = frozenset("tczyx")
_SPATIAL = frozenset("zyx")


def import_zarr() -> Any:
    """The package zarr.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module("zarr")
    except ImportError as error:
        raise ImportError(
            f"Zarr stores are read and written by the package zarr ({error}): pip install 'monai_patchqueue[zarr]'"
        ) from error


class ZarrArray:
    """An array in a Zarr store, with its axes in another order; regions are read as they are asked for.

    Args:
        file: its path, for messages.
        array: zarr's array. It holds no open file, so that it may cross to other processes and threads.
        axes: the array's axes in the order that is wanted; those that are not among them are of length 1.
    """

    def __init__(self, file: str, array: Any, axes: Sequence[int]) -> None:
        self.file = file
        self.axes = tuple(axes)
        self.shape: tuple[int, ...] = tuple(int(array.shape[axis]) for axis in axes)
        self.dtype: np.dtype[Any] = np.dtype(array.dtype)
        self.order = "C" if list(axes) == sorted(axes) else "F"
        self._array = array
        self._left_out = tuple(axis for axis in range(len(array.shape)) if axis not in self.axes)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """A region: one slice without a step for each axis.

        Raises:
            OSError: chunks cannot be read or decompressed.
        """
        region = [slice(0, 1)] * len(self._array.shape)
        for axis, wanted, n in zip(self.axes, index, self.shape, strict=True):
            start, stop, _ = wanted.indices(n)
            region[axis] = slice(start, max(start, stop))
        try:
            part = np.asarray(self._array[tuple(region)])
        except MemoryError:
            raise
        except Exception as error:  # each codec has errors of its own
            raise OSError(
                f"{self.file!r} cannot be read at {[[s.start, s.stop] for s in region]} of {list(self._array.shape)} "
                f"({type(error).__name__}: {error}): expected chunks of dtype {self.dtype} as its metadata describe "
                "them; copy or download the store again, or install the codec that is missing"
            ) from error
        turned: np.ndarray = part.transpose(self._left_out + self.axes)[(0,) * len(self._left_out)]
        return turned


class ZarrVolume(NamedTuple):
    """A volume in a Zarr store.

    Attributes:
        stored: the numbers; axes as ``layout`` has them.
        layout: which axis has the channels, and the affine.
        named: whether the store says what its axes are.
    """

    stored: ZarrArray
    layout: Layout
    named: bool


def is_zarr(file: str | Path) -> bool:
    """Whether a path leads to a Zarr store or into one: a part of it ends in ``.zarr``, and it is no file.

    >>> is_zarr("ct.ome.zarr"), is_zarr("ct.ome.zarr/labels/liver/1"), is_zarr("ct.nii.gz")
    (True, True, False)
    """
    return any(part.lower().endswith(".zarr") for part in Path(file).parts) and not os.path.isfile(file)


def metadata_above(path: Path) -> list[Path]:
    """The metadata of the groups that a path in a store is in: they say where its voxels are."""
    return [file for group in _groups_above(path) for name in METADATA if (file := group / name).is_file()]


def open_zarr(file: str, channel_dim: int | str | None = None) -> ZarrVolume:
    """A volume in a Zarr store; only metadata are read here.

    Args:
        file: path of an array, or of a group with a multiscale image, of which the first level is taken.
        channel_dim: axis of the channels, in an array that has no names for its axes; others than ints: none.

    Raises:
        ImportError: the package zarr is not installed.
        FileNotFoundError: there is nothing at this path.
        OSError: metadata cannot be read.
        ValueError: what is there is no volume.
    """
    zarr, path = import_zarr(), Path(file)
    node = _open(zarr, path)
    image: dict[str, Any] | None = None
    try:
        if isinstance(node, zarr.Array):
            image, level = _image_above(zarr, path)
        else:
            image = _first_image(path, node)
            level = image["datasets"][0]
            node = _open(zarr, path / level["path"])
        shape, names = tuple(int(n) for n in node.shape), _names(node)
        if np.dtype(node.dtype).kind not in "biuf":
            raise ValueError(f"its dtype is {node.dtype}: expected integers, floats or booleans")
        if image is not None:
            layout = image_layout(image, level, shape)
        elif names:
            layout = Layout(*axes_in_order(names, shape), _affine(node))
        else:
            layout = _as_stored(shape, channel_dim, _affine(node))
    except ValueError as error:
        raise ValueError(f"{file!r}: {error}") from error
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        found = "" if image is None else f" of version {image['version']}"
        raise ValueError(
            f"{file!r}: its metadata 'multiscales'{found} cannot be understood ({type(error).__name__}: {error}): "
            "expected axes, datasets and coordinateTransformations as in OME-Zarr 0.4 or 0.5; convert it to one of them"
        ) from error
    return ZarrVolume(ZarrArray(file, node, layout.axes), layout, image is not None or bool(names))


def _open(zarr: Any, path: Path) -> Any:
    """The array or group at a path."""
    if not path.exists():
        there = next(parent for parent in path.absolute().parents if parent.exists())
        raise FileNotFoundError(f"{str(path)!r} is not there: {str(there)!r} has {_some(os.listdir(there))}")
    if not _is_node(path):
        raise ValueError(
            f"{str(path)!r} is neither array nor group: expected zarr.json (Zarr 3), .zarray or .zgroup (Zarr 2) in a "
            f"folder that has {_some(os.listdir(path))}"
        )
    if (path / METADATA[0]).exists() and zarr.__version__.startswith("2."):
        raise ValueError(
            f"{str(path)!r} is of Zarr's format 3, and zarr {zarr.__version__} reads 2: install zarr>=3, which needs "
            "Python 3.11"
        )
    try:
        return zarr.open(str(path), mode="r")
    except Exception as error:  # metadata can be wrong in any way
        raise OSError(
            f"the metadata of {str(path)!r} cannot be read ({type(error).__name__}: {error}): expected those of a Zarr "
            "array or group; copy or download the store again, or install the codec that is missing"
        ) from error


def _first_image(path: Path, group: Any) -> dict[str, Any]:
    images = multiscales_of(group.attrs)
    if not images:
        inside = [child.name for child in path.iterdir() if _is_node(child)]
        raise ValueError(
            f"it is a group without a multiscale image; name what is to be read in it, by {path}/…: it has "
            f"{_some(inside)}"
        )
    return images[0]


def _image_above(zarr: Any, path: Path) -> tuple[dict[str, Any] | None, Any]:
    """The image that an array is a level of, and its entry there; None if there is none."""
    for group in _groups_above(path):
        if _is_node(group):
            for image in multiscales_of(_open(zarr, group).attrs):
                for level in image["datasets"]:
                    if group / level["path"] == path:
                        return image, level
    return None, None


def _groups_above(path: Path) -> Iterator[Path]:
    return (parent for parent in path.parents if is_zarr(parent))


def _is_node(path: Path) -> bool:
    return any((path / name).is_file() for name in METADATA[:3])


def _names(array: Any) -> list[str] | None:
    """Names of an array's axes, if they are among t, c, z, y, x: Zarr 3 has them, and xarray writes them for Zarr 2."""
    metadata = getattr(array, "metadata", None)
    names = getattr(metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS") or ()
    return list(names) if set(names) <= _NAMES and len(set(names) & _SPATIAL) >= 2 else None


def _affine(array: Any) -> np.ndarray:
    """The affine that :class:`PatchAggregator` writes beside an array, or the identity."""
    affine = np.asarray(array.attrs.get("affine", np.eye(4)))
    return affine.astype(np.float64) if affine.shape == (4, 4) else np.eye(4)


def _as_stored(shape: Sequence[int], channel_dim: int | str | None, affine: np.ndarray) -> Layout:
    axes = list(range(len(shape)))
    if not isinstance(channel_dim, int):
        return Layout(tuple(axes), False, affine)
    if channel_dim not in range(-len(axes), len(axes)):
        raise ValueError(f"channel_dim is {channel_dim}, and the array has shape {list(shape)}")
    channels = axes.pop(channel_dim)
    return Layout((channels, *axes), True, affine)


def _some(names: Sequence[str]) -> str:
    few = sorted(names)[:10]
    return f"{few}{' and more' if len(names) > len(few) else ''}" if few else "nothing"
