# SPDX-License-Identifier: Apache-2.0
"""A pipeline for each thread: transforms and random state anew, around the same data."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from types import CellType, FunctionType
from typing import Any

import numpy as np
import torch
from monai.transforms import Randomizable, Transform
from torch.utils.data import Dataset

from .seeding import reachable

__all__ = ["copy_for_thread"]

_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)


def copy_for_thread(dataset: Any, transform: Any = None) -> tuple[Any, Any]:
    """A dataset and a transform for a thread of its own; data and caches are shared.

    Returns:
        The copies; what dataset and transform have in common, their copies have too.

    Raises:
        TypeError: something that cannot be copied, or random state that threads would share.

    Example:
        >>> from monai.data import Dataset
        >>> from monai.transforms import RandFlip
        >>> dataset = Dataset([1, 2], RandFlip())
        >>> clone, _ = copy_for_thread(dataset)
        >>> clone.data is dataset.data, clone.transform is dataset.transform
        (True, False)
    """
    memo: dict[int, Any] = {}
    for obj in reachable((dataset, transform)):
        if isinstance(obj, torch.Generator):
            memo[id(obj)] = torch.Generator(obj.device).set_state(obj.get_state())
        elif isinstance(obj, FunctionType) and obj.__closure__ and _holds_state(obj):
            _copy_function(obj, memo)
    copies = _copy_dataset(dataset, memo), _deepcopy(transform, memo)
    originals = {id(obj) for obj in _random_objects((dataset, transform))}
    for obj in _random_objects(copies):
        if id(obj) in originals:
            raise TypeError(
                f"a {type(obj).__name__} would be shared between threads, which would draw from it in turns: it "
                "is held "
                "where it cannot be copied. Use worker_type='process', or keep it as a transform's or dataset's "
                "attribute."
            )
    return copies


def _copy_dataset(dataset: Any, memo: dict[int, Any]) -> Any:
    if id(dataset) in memo:
        return memo[id(dataset)]
    clone = memo[id(dataset)] = copy.copy(dataset)
    for name, value in getattr(dataset, "__dict__", {}).items():
        if isinstance(value, Dataset):
            copied = _copy_dataset(value, memo)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, Dataset) for v in value):
            copied = type(value)(_copy_dataset(v, memo) for v in value)
        elif callable(value) or _holds_state(value):
            copied = _deepcopy(value, memo)
        else:
            continue
        clone.__dict__[name] = copied
    return clone


def _copy_function(function: FunctionType, memo: dict[int, Any]) -> None:
    """Put a function with a closure of its own into the memo; ``copy.deepcopy`` by itself would share the closure."""
    old = function.__closure__ or ()
    new = tuple(CellType(cell.cell_contents) for cell in old)
    clone = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, new)
    clone.__kwdefaults__ = function.__kwdefaults__
    clone.__dict__.update(function.__dict__)
    memo[id(function)] = clone
    for cell in new:
        if _holds_state(cell.cell_contents):
            cell.cell_contents = _deepcopy(cell.cell_contents, memo)


def _deepcopy(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise TypeError(
            f"{type(value).__name__} cannot be copied, and each thread needs transforms of its own ({error}). Use "
            "worker_type='process', or make it copyable."
        ) from error


def _random_objects(root: object) -> Iterator[object]:
    return (obj for obj in reachable(root) if isinstance(obj, (Randomizable, *_GENERATORS)))


def _holds_state(root: object) -> bool:
    """Whether a thread needs its own copy: transforms have state, random or not."""
    kinds = (Transform, Randomizable, *_GENERATORS)
    return any(isinstance(obj, kinds) or hasattr(obj, "set_random_state") for obj in reachable(root))
