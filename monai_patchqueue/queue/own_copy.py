# SPDX-License-Identifier: Apache-2.0
"""Copies of what a queue keeps."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

__all__ = ["own_copy"]


_UNCHANGING = frozenset((bool, bytes, complex, float, int, str, type(None)))


def own_copy(value: Any) -> Any:
    """A copy of a value, down to its arrays: what a queue keeps is never handed out itself."""
    kind = type(value)
    if kind in _UNCHANGING:
        return value
    if kind is list or kind is tuple:
        return kind([part if type(part) in _UNCHANGING else own_copy(part) for part in value])
    if isinstance(value, dict):
        clone = copy.copy(value)  # of its own class, which collation keeps
        for key, part in value.items():
            if type(part) not in _UNCHANGING:
                clone[key] = own_copy(part)
        return clone
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    return value
