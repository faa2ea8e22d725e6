# SPDX-License-Identifier: Apache-2.0
"""What OME-Zarr's metadata (NGFF) say of an image: which axes are channels, x, y and z, and where its voxels are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Layout", "axes_in_order", "image_layout", "multiscales_of"]

_PREFIXES = {"yocto": -24, "zepto": -21, "atto": -18, "femto": -15, "pico": -12, "nano": -9, "micro": -6, "milli": -3,
             "centi": -2, "deci": -1, "": 0, "hecto": 2, "kilo": 3, "mega": 6, "giga": 9, "tera": 12, "peta": 15,
             "exa": 18, "zetta": 21, "yotta": 24}  # fmt: skip
_MILLIMETERS = {
    **{f"{prefix}meter": float(f"1e{power + 3}") for prefix, power in _PREFIXES.items()},
    "angstrom": 1e-7, "inch": 25.4, "foot": 304.8, "yard": 914.4, "mile": 1609344.0, "parsec": 3.0856775814913673e19,
    "nm": 1e-6, "um": 1e-3, "µm": 1e-3, "mm": 1.0, "cm": 10.0, "m": 1000.0,
}  # fmt: skip
"""NGFF's units of length, and abbreviations that are met with."""

_TOWARDS = {"left-to-right": (0, 1), "right-to-left": (0, -1),
            "posterior-to-anterior": (1, 1), "anterior-to-posterior": (1, -1),
            "inferior-to-superior": (2, 1), "superior-to-inferior": (2, -1)}  # fmt: skip
"""Anatomical orientations of axes (NGFF's RFC 4): axis and sign in a world whose x, y, z go right, front, up."""

_KINDS = {"x": "space", "y": "space", "z": "space", "t": "time", "c": "channel"}


class Layout(NamedTuple):
    """How an image lies in an array.

    Attributes:
        axes: the array's axes: that of the channels, if there is one, then x, y, z. Others are of length 1.
        has_channels: whether the first of them is that of the channels.
        affine: from voxels x, y, z to millimetres; float64 of shape [4, 4].
    """

    axes: tuple[int, ...]
    has_channels: bool
    affine: np.ndarray


def multiscales_of(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The images that a group's attributes describe, as NGFF 0.4 or 0.5 has them, with ``version``; maybe none."""
    ome = attributes.get("ome", attributes)
    return [{"version": ome.get("version"), **image} for image in ome.get("multiscales", ())]


def image_layout(image: Mapping[str, Any], level: Mapping[str, Any], shape: Sequence[int]) -> Layout:
    """How one level of a multiscale image lies in its array.

    Scale and translation of the level, and then those of the whole image, give the affine, in millimetres; a length
    without unit counts as millimetres. Axes that say their anatomical orientation go where they say, else x, y and z go
    right, front and up, as MONAI's affines have it.

    Args:
        image: entry of ``multiscales``.
        level: entry of its ``datasets``.
        shape: the array's.

    Raises:
        ValueError: several time points, axes that are no image's, transformations of another kind, an unknown unit.
        KeyError, TypeError, AttributeError: metadata that are not as NGFF has them.

    Example:
        >>> axes = [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]
        >>> level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [3000, 2000, 1000]}]}
        >>> layout = image_layout({"axes": axes}, level, (5, 6, 7))
        >>> layout.axes, layout.affine.diagonal().tolist()
        ((2, 1, 0), [1.0, 2.0, 3.0, 1.0])
    """
    axes: Sequence[Mapping[str, Any]] = image["axes"]
    names = [axis["name"] for axis in axes]
    kinds = [axis.get("type") or _KINDS.get(name, "other") for name, axis in zip(names, axes, strict=True)]
    order, has_channels = axes_in_order(names, shape, kinds)
    scale, shift = np.ones(len(axes)), np.zeros(len(axes))
    for step in (*level["coordinateTransformations"], *(image.get("coordinateTransformations") or ())):
        numbers = _numbers(step, len(axes))
        if step["type"] == "translation":
            shift += numbers
        else:
            scale *= numbers
            shift *= numbers
    spatial = order[1:] if has_channels else order
    units = np.array([_millimeters(axes[axis].get("unit")) for axis in spatial])
    index = list(spatial)
    affine = _oriented([axes[axis].get("orientation") for axis in spatial], scale[index] * units, shift[index] * units)
    return Layout(order, has_channels, affine)


def axes_in_order(
    names: Sequence[str], shape: Sequence[int], kinds: Sequence[str] | None = None
) -> tuple[tuple[int, ...], bool]:
    """The axis of the channels, if there is one, and x, y, z; and whether there is one of channels.

    Args:
        names: the axes'. Spatial ones of other names than x, y, z count as z, y, x, as NGFF recommends that order.
        shape: lengths of the axes. Time, and what is neither time, channel nor space, is left out where it is of
            length 1.
        kinds: ``"space"``, ``"time"``, ``"channel"`` or another one for each axis; None: by the names.

    Raises:
        ValueError: axes that are no image's.

    Example:
        >>> axes_in_order("tczyx", (1, 2, 7, 8, 9))
        ((1, 4, 3, 2), True)
    """
    described = f"axes {list(names)} of an array of shape {list(shape)}"
    if len(names) != len(shape):
        raise ValueError(f"{described}: expected a name for each axis")
    kinds = [_KINDS.get(name, "other") for name in names] if kinds is None else kinds
    spatial = [axis for axis, kind in enumerate(kinds) if kind == "space"]
    if len(spatial) not in (2, 3):
        raise ValueError(f"{described}: expected 2 or 3 of type 'space', found {len(spatial)}")
    if {names[axis] for axis in spatial} <= set("xyz"):
        spatial.sort(key=lambda axis: names[axis])
    else:
        spatial.reverse()
    for axis, kind in enumerate(kinds):
        if kind == "time" and shape[axis] != 1:
            raise ValueError(
                f"{described}: there are {shape[axis]} time points, and a volume has one; write each into an image of "
                "its own, or call the axis 'c', of type 'channel', for time points as channels"
            )
    others = [axis for axis, kind in enumerate(kinds) if kind not in ("space", "time")]
    channels = [axis for axis in others if shape[axis] != 1] or [axis for axis in others if kinds[axis] == "channel"]
    if len(channels) > 1:
        raise ValueError(f"{described}: expected one axis of channels, found {[names[axis] for axis in channels]}")
    return (*channels, *spatial), bool(channels)


def _numbers(step: Mapping[str, Any], axes: int) -> np.ndarray:
    """The numbers of a scale or a translation, one for each axis."""
    kind = step["type"]
    numbers = np.asarray(np.ones(axes) if kind == "identity" else step.get(kind, ()), dtype=np.float64)
    known = kind in ("scale", "translation", "identity") and numbers.shape == (axes,)
    if not known or not np.isfinite(numbers).all() or (kind == "scale" and not numbers.all()):
        raise ValueError(
            f"coordinateTransformations have {dict(step)}: expected a 'scale' or 'translation' of {axes} numbers, one "
            "for each axis"
        )
    return numbers


def _millimeters(unit: str | None) -> float:
    if unit is not None and unit not in _MILLIMETERS:
        raise ValueError(
            f"a spatial axis has the unit {unit!r}: expected one of NGFF's units of length, such as 'micrometer' or "
            "'millimeter', or none, for millimetres"
        )
    return 1.0 if unit is None else _MILLIMETERS[unit]


def _oriented(orientations: Sequence[Any], scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The affine of axes x, y, z with a scale and a shift along each, and maybe their anatomical orientations."""
    values = [orientation.get("value") if isinstance(orientation, Mapping) else None for orientation in orientations]
    towards = [_TOWARDS[value] for value in values if value in _TOWARDS]
    rows = [row for row, _ in towards]
    if len(set(rows)) != len(orientations):
        towards, rows = [(row, 1) for row in range(len(orientations))], list(range(len(orientations)))
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for column, (row, sign) in enumerate(towards):
        affine[row, column] = sign * scale[column]
        affine[row, 3] = sign * shift[column]
    if len(rows) == 2:
        affine[3 - sum(rows), 2] = 1
    return affine
