# SPDX-License-Identifier: Apache-2.0
"""Collation of dictionaries that also takes items of different shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import collate_meta_tensor_fn
from torch.utils.data import default_collate

from ..queue.record import as_tensor

__all__ = ["collate_patches"]

_NUMBERS = (bool, int, float, complex, np.number, np.bool_)


def collate_patches(
    items: Sequence[Any],
    key_filter: Collection[str] | Callable[[str], bool] | None = None,
    stack_tensors: bool = True,
    convert_np: bool = True,
    convert_numbers: bool = True,
    warn_when_unstackable: bool | Collection[str] = True,
) -> dict[str, Any]:
    """Make a batch of dictionaries: what fits together is stacked, all else becomes a list.

    Serves as ``collate_fn`` of any ``DataLoader`` and of :class:`PatchQueueLoader`. A stacked ``MetaTensor`` has the
    metadata that MONAI's ``list_data_collate`` gives it, so that it can be decollated and inverted.

    Args:
        items: dictionaries, or lists of them, as transforms that give several patches return; one after the other.
        key_filter: the keys that go into the batch, or a function that says of a key whether it does. Default: all keys
            of the first item.
        stack_tensors: stack tensors ``[*shape]`` of equal shapes to ``[len(items), *shape]``; otherwise they become
            lists. Different dtypes are promoted as ``torch.stack`` does.
        convert_np: make tensors of numpy arrays of numbers.
        convert_numbers: make a tensor ``[len(items)]`` of numbers; floats in torch's default dtype.
        warn_when_unstackable: warn of tensors whose shapes differ, once per batch, with keys and shapes; or the keys
            for which to warn.

    Returns:
        A tensor or a list per key. Strings, dictionaries and all other values are listed.

    Raises:
        TypeError: items that are no dictionaries.
        ValueError: no items, or one that lacks a key.

    Example:
        >>> import torch
        >>> from monai_patchqueue import collate_patches
        >>> items = [{"image": torch.zeros(1, n, n), "age": 50 + n, "case": f"case_{n}"} for n in (4, 4)]
        >>> batch = collate_patches(items)
        >>> batch["image"].shape, batch["age"], batch["case"]
        (torch.Size([2, 1, 4, 4]), tensor([54, 54]), ['case_4', 'case_4'])
        >>> collate_patches(items, key_filter=["age"], convert_numbers=False)
        {'age': [54, 54]}
    """
    batch, ragged = _collated(items, key_filter, stack_tensors, convert_np, convert_numbers, warn_when_unstackable)
    if ragged:
        _warn(ragged)
    return batch


class WarnsOnce:
    """:func:`collate_patches` for all batches of a run: the first that cannot be stacked gives the warning."""

    def __init__(self) -> None:
        self._warned = False

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        """A batch."""
        batch, ragged = _collated(items)
        if ragged and not self._warned:
            self._warned = True
            _warn(ragged)
        return batch


def _collated(
    items: Sequence[Any],
    key_filter: Collection[str] | Callable[[str], bool] | None = None,
    stack_tensors: bool = True,
    convert_np: bool = True,
    convert_numbers: bool = True,
    warn_when_unstackable: bool | Collection[str] = True,
) -> tuple[dict[str, Any], dict[str, list[tuple[int, ...]]]]:
    """A batch, and the shapes under each key for which a warning is due."""
    dicts = _flatten(items)
    batch: dict[str, Any] = {}
    ragged: dict[str, list[tuple[int, ...]]] = {}
    for key in _keys(dicts[0], key_filter):
        values = [_value(item, number, key) for number, item in enumerate(dicts)]
        if convert_np and all(map(_is_numeric, values)):
            values = [as_tensor(value) for value in values]
        batch[key] = values
        if convert_numbers and all(isinstance(value, _NUMBERS) for value in values):
            batch[key] = torch.tensor(values)
        elif stack_tensors and all(isinstance(value, torch.Tensor) for value in values):
            shapes = [tuple(value.shape) for value in values]
            if len(set(shapes)) == 1:
                batch[key] = _stack(values)
            elif _is_wanted(key, warn_when_unstackable):
                ragged[key] = shapes
    return batch, ragged


def _flatten(items: Sequence[Any]) -> list[Mapping[str, Any]]:
    dicts = [d for item in items for d in (item if isinstance(item, (list, tuple)) else [item])]
    if not dicts:
        raise ValueError("there is nothing to collate: expected one item or more.")
    for number, item in enumerate(dicts):
        if not isinstance(item, Mapping):
            raise TypeError(f"item {number} is a {type(item).__name__}: expected dictionaries, or lists of them.")
    return dicts


def _keys(item: Mapping[str, Any], key_filter: Collection[str] | Callable[[str], bool] | None) -> list[str]:
    if key_filter is None:
        return list(item)
    if callable(key_filter):
        return [key for key in item if key_filter(key)]
    return [key_filter] if isinstance(key_filter, str) else list(key_filter)


def _value(item: Mapping[str, Any], number: int, key: str) -> Any:
    if key not in item:
        raise ValueError(
            f"item {number} has no key {key!r}, only {sorted(map(str, item))}. Every item of a batch needs the keys of "
            "the first one: leave it out by key_filter, or add it where it is missing."
        )
    return item[key]


def _is_numeric(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biufc"


def _is_wanted(key: str, keys: bool | Collection[str]) -> bool:
    return keys if isinstance(keys, bool) else key == keys if isinstance(keys, str) else key in keys


def _stack(values: list[torch.Tensor]) -> torch.Tensor:
    if all(isinstance(value, MetaTensor) for value in values):
        stacked: torch.Tensor = collate_meta_tensor_fn(values)
        return stacked
    plain = [value.as_tensor() if isinstance(value, MetaTensor) else value for value in values]
    if len({value.dtype for value in plain}) > 1:
        return torch.stack(plain)
    stacked = default_collate(plain)  # in a DataLoader's worker, at once in shared memory
    return stacked


def _warn(ragged: Mapping[str, Sequence[tuple[int, ...]]]) -> None:
    found = "; ".join(f"{key!r}: {', '.join(map(str, shapes))}" for key, shapes in ragged.items())
    warnings.warn(
        f"tensors of different shapes cannot be stacked, and stay lists: {found}. Pad or crop them to one shape "
        "(SpatialPadd, ResizeWithPadOrCropd), or pass warn_when_unstackable=False.",
        stacklevel=3,
    )
