# SPDX-License-Identifier: Apache-2.0
"""Copies of what a queue keeps."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

__all__ = ["own_copy"]


def own_copy(value: Any) -> Any:
    """A copy of a value, down to its arrays: what a queue keeps is never handed out itself."""
    if isinstance(value, dict):
        clone = copy.copy(value)  # of its own class, which collation keeps
        clone.update({key: own_copy(item) for key, item in value.items()})
        return clone
    if type(value) in (list, tuple):
        return type(value)(own_copy(item) for item in value)
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    return value
