# SPDX-License-Identifier: Apache-2.0
"""What of a volume's patches does not go through the slab: strings, numbers, metadata, traces.

They travel as one record per volume, in which the patches share whatever is equal between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from ..io.copies import own_copy
from ..io.lazy_tensor import LazyTensor
from .meta_rows import MetaRows
from .slab import KeySpec

__all__ = ["VolumeRecord", "array_specs", "as_tensor", "first_difference", "pack", "slab_specs"]

# Smaller arrays cost less in the record than a slot of their own.
SLAB_NBYTES = 4096

Patch = Mapping[str, Any]


@dataclass
class VolumeRecord:
    """The part of a volume's patches beside the slab.

    Args:
        keys: the patches' keys, in order.
        shared: values that all patches have in common.
        own: per patch, the values that differ.
        meta: per slab key with metadata, what each patch's ``MetaTensor`` has besides its data: as rows, or as it is.
        narrow: per slab key, for each patch the dtype in which its slot has it, if that is not the key's own.
        seconds: time spent per stage (``"load"``, ``"sample"``, ``"write"``), and processor time (``"cpu"``).
        transforms: time spent per transform.
    """

    keys: tuple[str, ...]
    shared: dict[str, Any]
    own: list[dict[str, Any]]
    meta: dict[str, MetaRows | list[dict[str, Any]]]
    narrow: dict[str, list[np.dtype[Any] | None]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    transforms: dict[str, float] = field(default_factory=dict)

    def attributes(self, key: str, patch: int) -> dict[str, Any]:
        """The attributes of a patch's ``MetaTensor``, in memory of their own."""
        meta = self.meta[key]
        return meta.attributes(patch) if isinstance(meta, MetaRows) else own_copy(meta[patch])

    def value(self, key: str, patch: int) -> Any:
        """Value of a key that is not in the slab."""
        own = self.own[patch]
        return own[key] if key in own else self.shared[key]


def as_tensor(array: torch.Tensor | np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor over the array's memory, without metadata."""
    if isinstance(array, LazyTensor):
        return array.values()  # of the patch; its memory is its volume's
    if isinstance(array, MetaTensor):
        plain: torch.Tensor = array.as_tensor()
        return plain.detach()
    if isinstance(array, torch.Tensor):
        return array.detach()
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides) or not array.flags.writeable:
        array = array.copy()  # torch has neither negative strides nor read-only memory
    return torch.from_numpy(array)


def spec_of(value: Any) -> KeySpec | None:
    """Shape and dtype of an array as it would lie in the slab; ``None`` for anything else."""
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        return KeySpec(tuple(value.shape), value.dtype, isinstance(value, MetaTensor))
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return KeySpec(value.shape, as_tensor(np.empty(0, value.dtype)).dtype)
    return None


def array_specs(patch: Patch, always: Iterable[str] = ()) -> dict[str, KeySpec]:
    """The arrays of a patch that go through the slab: those of 4 KiB and more, and those under the keys ``always``."""
    specs = {key: spec_of(value) for key, value in patch.items()}
    return {
        key: spec for key, spec in specs.items() if spec is not None and (spec.nbytes >= SLAB_NBYTES or key in always)
    }


def slab_specs(patch: Patch) -> dict[str, KeySpec]:
    """The arrays of a patch that go through the slab, and the order that their axes are to have there: this patch's."""
    return {key: replace(spec, order=_memory_order(patch[key])) for key, spec in array_specs(patch).items()}


def _memory_order(array: torch.Tensor | np.ndarray[Any, Any]) -> tuple[int, ...] | None:
    """The axes from the slowest to the fastest in memory; ``None`` where that is as they are numbered."""
    shape, strides = array.shape, array.stride() if isinstance(array, torch.Tensor) else array.strides
    order = tuple(sorted(range(len(shape)), key=lambda axis: (shape[axis] > 1, -abs(strides[axis]), axis)))
    long = [axis for axis in order if shape[axis] > 1]
    return None if long == sorted(long) else order


def pack(patches: Sequence[Patch], slab_keys: Mapping[str, KeySpec]) -> VolumeRecord:
    """Put together all that does not go through the slab.

    Example:
        >>> patches = [{"case": "a", "center": 3}, {"case": "a", "center": 5}]
        >>> record = pack(patches, {})
        >>> record.shared, record.own
        ({'case': 'a'}, [{'center': 3}, {'center': 5}])
    """
    rest = [{key: value for key, value in patch.items() if key not in slab_keys} for patch in patches]
    shared, own = _factor(rest)
    meta: dict[str, MetaRows | list[dict[str, Any]]] = {}
    for key, spec in slab_keys.items():
        if spec.meta:
            attributes = [dict(vars(patch[key])) for patch in patches]
            meta[key] = MetaRows.of(attributes) or attributes
    return VolumeRecord(tuple(patches[0]), shared, own, meta)


def _factor(dicts: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    first = dicts[0]
    shared = {key: value for key, value in first.items() if all(_equal(value, other.get(key)) for other in dicts[1:])}
    return shared, [{key: value for key, value in d.items() if key not in shared} for d in dicts]


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return type(a) is torch.Tensor and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, (str, bytes, int, float, complex, bool, np.generic)):
        return bool(a == b)
    return False


def first_difference(expected: Mapping[str, KeySpec], found: Mapping[str, KeySpec]) -> str | None:
    """What differs between two sets of specs, in words; ``None`` where nothing does."""
    for key in _ordered_union(expected, found):
        a, b = expected.get(key), found.get(key)
        if a != b:
            return f"key {key!r} is {a or 'no large array'} there and {b or 'no large array'} here"
    return None


def _ordered_union(*keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(key for part in keys for key in part))
