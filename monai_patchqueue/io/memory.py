# SPDX-License-Identifier: Apache-2.0
"""The memory of lazily read tensors, which is filled when something needs it."""

from __future__ import annotations

import threading

import torch

from .deferred import Deferred

__all__ = ["Memory"]


class Memory:
    """What a tensor and its views share: values that are still to be computed, or the memory that has them.

    Args:
        values: of the whole memory.
        like: a tensor of its shape and strides on the device "meta".
    """

    __slots__ = ("_like", "_lock", "_values", "filled")

    def __init__(self, values: Deferred, like: torch.Tensor) -> None:
        self._values = values
        self._like = like
        self._lock = threading.Lock()
        self.filled: torch.Tensor | None = None

    def numel(self) -> int:
        """How many values there are."""
        return self._like.numel()

    def fill(self) -> torch.Tensor:
        """Compute all values, once."""
        with self._lock:
            if self.filled is None:
                values = self._values.compute()
                if _steps(values) != _steps(self._like):
                    values = torch.empty_strided(values.shape, self._like.stride(), dtype=values.dtype).copy_(values)
                self.filled = values
            return self.filled


def _steps(tensor: torch.Tensor) -> list[int]:
    """Strides of the axes along which there are any."""
    return [stride for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]
