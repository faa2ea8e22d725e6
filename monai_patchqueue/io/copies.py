# SPDX-License-Identifier: Apache-2.0
"""Copies of what is kept: mostly metadata, which are many small values."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

__all__ = ["deep_copy", "own_copy"]


_UNCHANGING = frozenset((bool, bytes, complex, float, int, str, type(None)))


def own_copy(value: Any) -> Any:
    """A copy of a value, down to its arrays: what is kept is never handed out itself."""
    kind = type(value)
    if kind in _UNCHANGING:
        return value
    if kind is list or kind is tuple:
        return kind([part if type(part) in _UNCHANGING else own_copy(part) for part in value])
    if isinstance(value, dict):
        clone = copy.copy(value)  # of its own class, which collation keeps
        for key, part in value.items():
            if type(part) is np.ndarray:
                clone[key] = part.copy()
            elif type(part) not in _UNCHANGING:
                clone[key] = own_copy(part)
        return clone
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    return value


def deep_copy(value: Any, memo: dict[int, Any]) -> Any:
    """What ``copy.deepcopy(value, memo)`` gives; in a tenth of the time for dictionaries of small arrays."""
    kind = type(value)
    if kind in _UNCHANGING:
        return value
    if id(value) in memo:
        return memo[id(value)]
    copied: Any
    if kind is dict:
        copied = memo[id(value)] = {}
        for key, part in value.items():
            copied[key] = part if type(part) in _UNCHANGING else deep_copy(part, memo)
    elif kind is list:
        copied = memo[id(value)] = []
        copied += [deep_copy(part, memo) for part in value]
    elif kind is np.ndarray and not value.dtype.hasobject:
        copied = memo[id(value)] = value.copy(order="K")
    elif kind is torch.Tensor and value.layout is torch.strided and not value.requires_grad:
        copied = memo[id(value)] = value.clone()
    else:
        copied = copy.deepcopy(value, memo)
    return copied
