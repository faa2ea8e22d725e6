# SPDX-License-Identifier: Apache-2.0
"""Items of a dataset as plain data: JSON that gives back the very types and bits, and runs no code when it is read."""

from __future__ import annotations

import base64
import enum
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import monai.utils.enums
import numpy as np
import torch
from monai.data import MetaTensor

__all__ = ["Tagged", "decode", "encode"]

TAG, VALUE = "~", "v"
"""Keys of a JSON object: of which kind a value is, and what is needed to make it."""

Keep = Callable[[Any, str], "Tagged | None"]
"""Is shown each array with the path of keys to it, and says what stands for it; None: it is kept in the JSON."""
Fetch = Callable[[str, Any], Any]
"""Is given a kind and content that a :data:`Keep` made up, and gives the value."""


class Tagged(NamedTuple):
    """A value of a kind that JSON does not have."""

    kind: str
    content: Any


class _Kind(NamedTuple):
    name: str
    classes: tuple[type, ...]
    to_json: Callable[[Any], Any]
    from_json: Callable[[Any], Any]


def encode(value: Any, keep: Keep, path: str = "") -> Any:
    """A value as JSON.

    Args:
        value: dictionaries, lists, tuples, numbers, strings, paths, arrays, tensors, MetaTensors, in each other.
        keep: takes arrays that are to lie elsewhere.
        path: the keys that lead to the value.

    Raises:
        TypeError: for anything else; the message has its path.

    >>> encode({"age": 40, 1: (2.5, None)}, lambda array, path: None)
    {'~': 'dict', 'v': [['age', 40], [1, {'~': 'tuple', 'v': [2.5, None]}]]}
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [encode(v, keep, f"{path}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, torch.Tensor | np.ndarray):
        tagged = keep(value, path) or _array(value, keep, path)
    elif type(value) is tuple:
        tagged = Tagged("tuple", [encode(v, keep, f"{path}[{i}]") for i, v in enumerate(value)])
    elif isinstance(value, Mapping):
        tagged = Tagged("dict", [[encode(k, keep, path), encode(v, keep, f"{path}/{k}")] for k, v in value.items()])
    else:
        tagged = _simple(value, path)
    return {TAG: tagged.kind, VALUE: tagged.content}


def decode(tree: Any, fetch: Fetch) -> Any:
    """The value that was encoded.

    Args:
        tree: as :func:`encode` gives it.
        fetch: gives the arrays that lie elsewhere.
    """
    if isinstance(tree, list):
        return [decode(v, fetch) for v in tree]
    if not isinstance(tree, dict):
        return tree
    kind, content = tree[TAG], tree[VALUE]
    if kind == "dict":
        return {decode(k, fetch): decode(v, fetch) for k, v in content}
    if kind == "tuple":
        return tuple(decode(v, fetch) for v in content)
    if kind == "MetaTensor":
        data, meta, operations = (decode(v, fetch) for v in content)
        return MetaTensor(data, meta=meta, applied_operations=operations)
    return _KINDS[kind].from_json(content) if kind in _KINDS else fetch(kind, content)


def _array(value: Any, keep: Keep, path: str) -> Tagged:
    if isinstance(value, MetaTensor):
        meta = encode(value.meta, keep, f"{path}.meta")
        operations = encode(value.applied_operations, keep, f"{path}.applied_operations")
        return Tagged("MetaTensor", [encode(value.as_tensor(), keep, path), meta, operations])
    return _simple(value.detach().cpu() if isinstance(value, torch.Tensor) else value, path)


def _simple(value: Any, path: str) -> Tagged:
    for kind in _KINDS.values():
        if isinstance(value, kind.classes):
            try:
                return Tagged(kind.name, kind.to_json(value))
            except TypeError:
                break
    raise TypeError(
        f"{path.lstrip('/') or 'the item'} is {type(value).__module__}.{type(value).__qualname__}"
        f"{f' of dtype {value.dtype}' if hasattr(value, 'dtype') else ''}, which cannot be kept as plain data: leave "
        "it out (DeleteItemsd), or make arrays, numbers, strings, lists or dictionaries of it, before the first random "
        "transform"
    )


def _to_bytes(array: np.ndarray) -> list[Any]:
    if array.dtype.kind not in "biufcSUmM":
        raise TypeError
    return [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode()]


def _from_bytes(content: list[Any]) -> np.ndarray:
    dtype, shape, text = content
    array: np.ndarray = np.frombuffer(base64.b64decode(text), dtype).reshape(shape).copy()  # in memory of its own
    return array


def _monais(name_and_value: list[Any]) -> Any:
    """A member of one of MONAI's enumerations, which keys of metadata are; no other class is looked up by name."""
    cls = getattr(monai.utils.enums, name_and_value[0])
    if not issubclass(cls, enum.Enum):
        raise TypeError(f"{name_and_value[0]} is no enumeration")
    return cls(name_and_value[1])


def _from_monai(member: enum.Enum) -> list[Any]:
    if type(member).__module__ != monai.utils.enums.__name__:
        raise TypeError
    return [type(member).__name__, member.value]


_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}

_KINDS = {
    kind.name: kind
    for kind in (
        _Kind("array", (np.ndarray,), _to_bytes, _from_bytes),
        _Kind("tensor", (torch.Tensor,), lambda v: _to_bytes(v.numpy()), lambda c: torch.from_numpy(_from_bytes(c))),
        _Kind("number", (np.generic,), lambda v: _to_bytes(np.asarray(v)), lambda c: _from_bytes(c)[()]),
        _Kind("enum", (enum.Enum,), _from_monai, _monais),
        _Kind("str", (str,), str, str),  # a subclass of it
        _Kind("path", (PurePath,), str, Path),
        _Kind("bytes", (bytes,), lambda v: base64.b64encode(v).decode(), base64.b64decode),
        _Kind("complex", (complex,), lambda v: [v.real, v.imag], lambda c: complex(*c)),
        _Kind("size", (torch.Size,), list, torch.Size),
        _Kind("torch dtype", (torch.dtype,), str, _DTYPES.__getitem__),
        _Kind("dtype", (np.dtype,), lambda v: v.str, np.dtype),
        _Kind("device", (torch.device,), str, torch.device),
    )
}
