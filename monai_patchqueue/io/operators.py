# SPDX-License-Identifier: Apache-2.0
"""Torch's operators that commute with cutting, and what they are of deferred values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from .deferred import Box, Change

__all__ = ["CASTS", "COPIES", "SHAPE_ONLY", "VIEWS", "VOXELWISE", "same_bits_everywhere"]

aten = torch.ops.aten

Changes: TypeAlias = Callable[..., "Change | list[Change] | None"]


def _unchanged(shape: Sequence[int], *_: Any, **__: Any) -> Change:
    return lambda box: box


def _permute(shape: Sequence[int], dims: Sequence[int]) -> Change:
    return lambda box: box.permute([dim % len(shape) for dim in dims])


def _transpose(shape: Sequence[int], a: int, b: int) -> Change:
    dims = list(range(len(shape)))
    dims[a], dims[b] = dims[b], dims[a]
    return lambda box: box.permute(dims)


def _slice(
    shape: Sequence[int], dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Change:
    there = range(*slice(start, end, step).indices(shape[dim]))
    return lambda box: box.walk(dim % len(shape), there.start if there else 0, step, len(there))


def _select(shape: Sequence[int], dim: int, index: int) -> Change:
    return lambda box: box.select(dim % len(shape), index % shape[dim])


def _unsqueeze(shape: Sequence[int], dim: int) -> Change:
    return lambda box: box.unsqueeze(dim % (len(shape) + 1))


def _squeeze(shape: Sequence[int], dim: int | Sequence[int] | None = None) -> Change:
    dims = range(len(shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    ones = sorted({d % len(shape) for d in dims if shape[d] == 1}, reverse=True)

    def change(box: Box) -> Box:
        for one in ones:
            box = box.select(one, 0)
        return box

    return change


def _expand(shape: Sequence[int], size: Sequence[int], **_: Any) -> Change:
    new = len(size) - len(shape)

    def change(box: Box) -> Box:
        for _ in range(new):
            box = box.unsqueeze(0)
        for dim, (old, n) in enumerate(zip(box.shape, size, strict=True)):
            if n not in (old, -1):
                box = box.repeat(dim, n)
        return box

    return change


def _unbind(shape: Sequence[int], dim: int = 0) -> list[Change]:
    return [_select(shape, dim, index) for index in range(shape[dim])]


def _split(shape: Sequence[int], size: int | Sequence[int], dim: int = 0) -> list[Change]:
    n = shape[dim]
    sizes = [min(size, n - first) for first in range(0, n, size)] if isinstance(size, int) else size
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_slice(shape, dim, start, start + length) for start, length in zip(starts, sizes, strict=True)]


def _view(shape: Sequence[int], size: Sequence[int]) -> Change | None:
    return (lambda box: box) if list(shape) == list(size) else None


def _flip(shape: Sequence[int], dims: Sequence[int]) -> Change:
    def change(box: Box) -> Box:
        for dim in dims:
            box = box.flip(dim % len(shape))
        return box

    return change


def _rot90(shape: Sequence[int], k: int = 1, dims: Sequence[int] = (0, 1)) -> Change:
    a, b = (dim % len(shape) for dim in dims)
    flips: dict[int, list[int]] = {0: [], 1: [b], 2: [a, b], 3: [a]}
    flip, transpose = _flip(shape, flips[k % 4]), _transpose(shape, a, b)
    return (lambda box: transpose(flip(box))) if k % 2 else flip


VIEWS: dict[Any, Changes] = {
    aten.alias.default: _unchanged,
    aten.detach.default: _unchanged,
    aten.lift_fresh.default: _unchanged,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.view.default: _view,
}
"""What gives other voxels, or the same in another order, in the same memory."""

COPIES: dict[Any, Changes] = {
    aten.clone.default: _unchanged,
    aten.flip.default: _flip,
    aten.rot90.default: _rot90,
}
"""What gives that in new memory."""

CASTS = frozenset({aten._to_copy.default})

VOXELWISE = frozenset(
    getattr(getattr(aten, name), overload)
    for name, overloads in {
        **dict.fromkeys(("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge"), ("Tensor", "Scalar")),
        **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), ("default", "Tensor")),
        **dict.fromkeys(("neg", "abs", "sign", "floor", "ceil", "round", "trunc", "nan_to_num"), ("default",)),
        **dict.fromkeys(("isnan", "isinf", "maximum", "minimum"), ("default",)),
        **dict.fromkeys(("logical_and", "logical_or", "logical_xor", "logical_not"), ("default",)),
        **dict.fromkeys(("bitwise_and", "bitwise_or", "bitwise_xor"), ("Tensor", "Scalar")),
        "bitwise_not": ("default",),
        "rsub": ("Scalar",),
        "where": ("self", "ScalarOther", "ScalarSelf"),
    }.items()
    for overload in overloads
)
"""What does something to each voxel by itself, and gives the number next to the true result.

Others, such as ``exp``, may differ in the last bit between a patch and the same voxels of a volume: their fast code
takes several voxels at a time, and another one does what is left.
"""

SHAPE_ONLY = frozenset(
    getattr(aten, name).default
    for name in (
        *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
        *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"),
    )
)
"""What needs no values."""

_EXACT = frozenset(
    {torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
)


def same_bits_everywhere(dtypes: Sequence[torch.dtype], kwargs: dict[str, Any]) -> bool:
    """Whether a voxelwise operator of these dtypes gives the same bits wherever a voxel lies in memory.

    Args:
        dtypes: of its tensors and its result.
        kwargs: its own.
    """
    return kwargs.get("alpha", 1) == 1 and _EXACT.issuperset(dtypes)
