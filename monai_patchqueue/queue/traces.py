# SPDX-License-Identifier: Apache-2.0
"""Traces of transforms that were copied for a worker, by which MONAI finds the transform to invert them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.data import MetaTensor
from monai.transforms.traits import InvertibleTrait
from monai.utils import TraceKeys

from .seeding import reachable

__all__ = ["TraceNames", "transform_ids"]


def transform_ids(*roots: object) -> tuple[int, ...]:
    """Identities of a pipeline's transforms that leave traces, in an order that a copy of the pipeline has too."""
    return tuple(id(obj) for obj in reachable(roots) if isinstance(obj, InvertibleTrait))


class TraceNames:
    """Gives traces of copied transforms the identities of the originals.

    Args:
        copies: identities of the transforms that leave the traces.
        originals: identities of those that are to invert them.
    """

    def __init__(self, copies: Sequence[int], originals: Sequence[int]) -> None:
        # Under fork and inline they are the same.
        differ = len(copies) == len(originals) and tuple(copies) != tuple(originals)
        self._names = dict(zip(copies, originals, strict=True)) if differ else {}

    def rename(self, value: Any) -> None:
        """Rename the traces of all MetaTensors in ``value``, in place."""
        if not self._names:
            return
        if isinstance(value, MetaTensor):
            value.applied_operations = _renamed(value.applied_operations, self._names)
        elif isinstance(value, Mapping):
            for part in value.values():
                self.rename(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                self.rename(part)


def _renamed(trace: Any, names: Mapping[int, int]) -> Any:
    if isinstance(trace, dict):
        return {
            key: names.get(value, value) if key == TraceKeys.ID else _renamed(value, names)
            for key, value in trace.items()
        }
    if type(trace) in (list, tuple):
        return type(trace)(_renamed(part, names) for part in trace)
    return trace
