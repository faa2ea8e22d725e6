# SPDX-License-Identifier: Apache-2.0
"""Messages between processes, and what to say of an object that cannot be one."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["describe_unpicklable", "dumps"]


class _RecordPickler(pickle.Pickler):
    # torch pickles a tensor through a whole archive (over 100 µs), and multiprocessing through a file descriptor;
    # the small ones in a record go as numpy arrays.
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is torch.Tensor and obj.dtype is not torch.bfloat16 and obj.layout is torch.strided:
            if obj.requires_grad or obj.device.type != "cpu":
                return NotImplemented
            return torch.from_numpy, (obj.numpy().copy(),)
        return NotImplemented


def dumps(obj: Any) -> bytes:
    """Pickle a message for another process."""
    buffer = io.BytesIO()
    _RecordPickler(buffer, pickle.HIGHEST_PROTOCOL).dump(obj)
    return buffer.getvalue()


def describe_unpicklable(root: object) -> str:
    """Name the innermost part of ``root`` that cannot be pickled.

    Example:
        >>> describe_unpicklable({"a": 1, "b": [2, lambda x: x]})
        "['b'][1] (a function: <lambda>)"
    """
    path, obj = "", root
    while True:
        for name, child in _parts(obj):
            if not _picklable(child):
                path, obj = path + name, child
                break
        else:
            label = getattr(obj, "__qualname__", type(obj).__qualname__).rsplit(".", 1)[-1]
            return f"{path.removeprefix('.')} (a {type(obj).__name__}: {label})"


def _parts(obj: object) -> Iterator[tuple[str, object]]:
    if isinstance(obj, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in obj.items())
    elif isinstance(obj, (list, tuple)):
        yield from ((f"[{index}]", value) for index, value in enumerate(obj))
    elif not isinstance(obj, type):
        yield from ((f".{name}", value) for name, value in getattr(obj, "__dict__", {}).items())


def _picklable(obj: object) -> bool:
    try:
        pickle.dumps(obj)
    except Exception:
        return False
    return True
