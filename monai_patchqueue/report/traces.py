# SPDX-License-Identifier: Apache-2.0
"""What patches' traces tell of where they were cut, and of flips since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from monai.data import MetaTensor
from monai.utils import TraceKeys

__all__ = ["Box", "boxes", "centers"]

_DO_TRANSFORM, _EXTRA_INFO, _ORIG_SIZE = TraceKeys.DO_TRANSFORM, TraceKeys.EXTRA_INFO, TraceKeys.ORIG_SIZE


class Box(NamedTuple):
    """A patch's place: where it starts, in a volume of which shape, and whether its voxels lie as they did there."""

    start: tuple[int, ...]
    volume: tuple[int, ...]
    as_it_was: bool


def boxes(patches: Any) -> list[Box | None]:
    """Where the patches of a batch were cut, as their traces say.

    Args:
        patches: [B, C, *spatial], as MONAI's ``list_data_collate`` makes it.

    Returns:
        By patch: its place, or ``None`` where its trace has no crop to its shape.
    """
    if not isinstance(patches, MetaTensor):
        return [None] * len(patches)
    shape = tuple(patches.as_subclass(torch.Tensor).shape[2:])  # a MetaTensor's own properties are slow
    return [_box(trace, shape) for trace in patches.applied_operations]


def _box(trace: Any, shape: tuple[int, ...]) -> Box | None:
    as_it_was = True
    for operation in reversed(trace if isinstance(trace, (list, tuple)) else ()):
        for info in _infos(operation):
            cut, volume = info.get("cropped"), operation.get(_ORIG_SIZE)
            if cut is not None and volume is not None and len(cut) == 2 * len(volume):
                start = tuple(int(n) for n in cut[::2])
                size = tuple(int(n) - a - int(b) for n, a, b in zip(volume, start, cut[1::2], strict=True))
                if size == shape:
                    return Box(start, tuple(int(n) for n in volume), as_it_was)
        as_it_was &= not operation.get(_DO_TRANSFORM, True)
    return None


def _infos(operation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What an operation's trace and those nested in it say beyond their names."""
    infos: list[Mapping[str, Any]] = []
    info = operation.get(_EXTRA_INFO)
    while isinstance(info, dict):
        infos.append(info)
        info = info.get(_EXTRA_INFO)
    return infos


def centers(patches: Any, shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Where the voxel is now that was each patch's center when it was cut: a flip moves it by one where sizes are even.

    Args:
        patches: [B, C, *spatial].
        shape: its spatial shape, of which a ``MetaTensor`` makes long work.
    """
    middle = tuple(size // 2 for size in shape)
    if not isinstance(patches, MetaTensor):
        return [middle] * len(patches)
    return [_center(trace, shape, middle) for trace in patches.applied_operations]


def _center(trace: Any, shape: Sequence[int], middle: tuple[int, ...]) -> tuple[int, ...]:
    center = middle
    for operation in reversed(trace if isinstance(trace, (list, tuple)) else ()):
        for info in _infos(operation):
            if "cropped" in info:
                return center
            if "axes" in info and operation.get(_DO_TRANSFORM, True):  # MONAI's Flip, or a random one around it
                axes = range(len(shape)) if info["axes"] is None else _as_list(info["axes"])
                flipped = {int(axis) % len(shape) for axis in axes}
                center = tuple(
                    size - 1 - at if axis in flipped else at
                    for axis, (at, size) in enumerate(zip(center, shape, strict=True))
                )
    return center


def _as_list(axes: Any) -> Sequence[Any]:
    return axes if isinstance(axes, Sequence) else [axes]
