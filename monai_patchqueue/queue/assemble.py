# SPDX-License-Identifier: Apache-2.0
"""From drawn slots to the batch that the consumer gets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, list_data_collate
from monai.data.utils import collate_meta_tensor_fn

from ..io.copies import own_copy
from ..io.reused_memory import is_idle
from .epoch import DrawnPatch
from .meta_rows import MetaRows
from .recorder import Recorder
from .schedule import BATCH, ITEM, seed_sequence
from .seeding import Reseeder
from .slab import Slab, SlabInfo
from .transfer import Transfer

__all__ = ["Assembler", "BufferPool"]

_CAST_ANYWHERE = {
    np.dtype(np.bool_): torch.bool,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int8): torch.int8,
    np.dtype(np.int16): torch.int16,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
}
"""Dtypes that every device knows how to cast; torch's other unsigned integers are not among them."""


class BufferPool:
    """Batch buffers that are used again once nobody refers to them.

    Writing to memory for the first time costs many times what writing to it again does. A buffer's owner is a numpy
    array that every tensor over it refers to, so its reference count sees views, decollated pieces and autograd graphs.
    """

    def __init__(self, most: int = 8) -> None:
        self._most = most
        self._buffers: dict[int, list[np.ndarray[Any, Any]]] = {}

    def take(self, nbytes: int) -> torch.Tensor:
        """``nbytes`` bytes that nothing else refers to."""
        return torch.from_numpy(self._take(nbytes))

    def _take(self, nbytes: int) -> np.ndarray[Any, Any]:
        buffers = self._buffers.setdefault(nbytes, [])
        for index in range(len(buffers)):
            if is_idle(buffers, index):
                return buffers[index]
        buffer = np.empty(nbytes, np.uint8)
        if len(buffers) < self._most:
            buffers.append(buffer)
        return buffer


class Assembler:
    """Makes batches: one gather per key, metadata as MONAI's collation gives it.

    Args:
        seed: the run's seed.
        item_transform: applied to a copy of each drawn patch.
        batch_transform: applied to the collated batch.
        collate_fn: called with a list of patches instead of ``standard``.
        standard: collates dictionaries key by key, and stacks arrays as MONAI's ``list_data_collate`` does; so what is
            gathered from the slab need not be stacked again.
        annotate: gives more keys for a batch, from the patches it is made of.
        pin_memory: gather into page-locked memory.
        device: move tensors there, without waiting for the copy.
        volume_name: a volume's name, for messages.
        recorder: where it is noted how long a batch takes.
    """

    def __init__(
        self,
        seed: int,
        *,
        item_transform: Callable[[Any], Any] | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        standard: Callable[[list[Any]], dict[str, Any]] = list_data_collate,
        annotate: Callable[[Sequence[DrawnPatch]], dict[str, torch.Tensor]] | None = None,
        pin_memory: bool = False,
        device: torch.device | None = None,
        volume_name: Callable[[int], str] = "volume {}".format,
        recorder: Recorder | None = None,
    ) -> None:
        self._seed = seed
        self._recorder = recorder or Recorder()
        self._volume_name = volume_name
        self._item_transform = item_transform
        self._batch_transform = batch_transform
        self._collate_fn = collate_fn
        self._standard = standard
        self._annotate = annotate
        on_cuda = device is not None and device.type == "cuda"
        self._pin = (pin_memory or on_cuda) and torch.cuda.is_available()
        self._transfer = None if device is None else Transfer(device)
        self._pool = BufferPool()
        self._reseed_item = Reseeder(item_transform)
        self._reseed_batch = Reseeder(batch_transform)

    def __call__(
        self, info: SlabInfo, patches: Sequence[DrawnPatch], epoch: int, number: int
    ) -> tuple[Any, Callable[[], None] | None]:
        """The ``number``-th batch of ``epoch``. Everything in it is the caller's: nothing refers to the slab.

        With it comes what the caller's thread has to call before it uses the batch, if anything.
        """
        start = time.perf_counter()
        seconds = dict.fromkeys(("item_transform", "batch_transform"), 0.0)
        in_slab = [patch for patch in patches if patch.loose is None]
        whole = self._item_transform is None and self._collate_fn is None and len(in_slab) == len(patches)
        moved = self._transfer if whole else None
        keys = info.slab.layout.keys if in_slab else {}
        arrays = {key: self._gather(info.slab, key, in_slab, moved is not None and moved.casts) for key in keys}
        if moved is not None:  # before they are MetaTensors, whose metadata would be copied as well
            arrays = {key: moved.move(array, keys[key].dtype) for key, array in arrays.items()}
        if whole:
            batch = self._collate(arrays, patches)
        else:
            rows = iter(range(len(in_slab)))
            items = [_item(arrays, next(rows), p) if p.loose is None else own_copy(p.loose) for p in patches]
            if self._item_transform is not None:
                with _adding_to(seconds, "item_transform"):
                    items = [self._transform_item(patch, item) for patch, item in zip(patches, items, strict=True)]
            batch = (self._collate_fn or self._standard)(items)
        if self._annotate is not None:
            batch = _with_keys(batch, self._annotate(patches))
        handover = None
        if self._transfer is None:
            batch = self._transform_batch(batch, epoch, number, seconds)
        else:
            with self._transfer.stream():
                batch = self._transform_batch(self._transfer(batch), epoch, number, seconds)
            handover = self._transfer.handover(batch)
        rest = time.perf_counter() - start - sum(seconds.values())
        self._recorder.assembled({"assembly": rest, **seconds})
        return batch, handover

    def _collate(self, arrays: Mapping[str, torch.Tensor], patches: Sequence[DrawnPatch]) -> dict[str, Any]:
        """What the standard collation would give, without stacking the arrays again."""
        keys = patches[0].record.keys
        for patch in patches:
            odd = sorted(map(str, set(keys) ^ set(patch.record.keys)))
            if odd:
                first, other = (self._volume_name(p.ticket.volume) for p in (patches[0], patch))
                raise ValueError(
                    f"{first} and {other} differ in their keys {odd}: patches of all volumes need the same keys. Add "
                    "DeleteItemsd, or the keys where they are missing."
                )
        small = [
            {key: own_copy(p.record.value(key, p.draw.patch)) for key in keys if key not in arrays} for p in patches
        ]
        collated = self._standard(small) if small[0] else {}
        batch = {}
        for key in keys:
            if key not in arrays:
                batch[key] = collated[key]
            elif key in patches[0].record.meta:
                batch[key] = _with_meta(arrays[key], key, patches)
            else:
                batch[key] = arrays[key]
        return batch

    def _transform_batch(self, batch: Any, epoch: int, number: int, seconds: dict[str, float]) -> Any:
        if self._batch_transform is None:
            return batch
        with _adding_to(seconds, "batch_transform"):
            self._reseed_batch(seed_sequence(self._seed, BATCH, epoch, number))
            return self._batch_transform(batch)

    def _gather(self, slab: Slab, key: str, patches: Sequence[DrawnPatch], narrow: bool) -> torch.Tensor:
        """The patches of a batch; ``narrow`` as they lie in their slots, if that is alike for all."""
        dtypes = [p.record.narrow[key][p.draw.patch] if key in p.record.narrow else None for p in patches]
        spec = slab.layout.keys[key]
        if narrow and dtypes[0] in _CAST_ANYWHERE and len(set(dtypes)) == 1:
            spec = replace(spec, dtype=_CAST_ANYWHERE[dtypes[0]])
        nbytes = len(patches) * spec.nbytes
        # torch has a pool of its own for page-locked memory, which knows of copies that are under way.
        out = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) if self._pin else self._pool.take(nbytes)
        gathered = spec.view(out.view(spec.dtype))
        if not any(dtypes):
            slots = np.array([patch.slot for patch in patches], np.intp)
            np.take(slab.rows[key], slots, axis=0, out=out.numpy().reshape(len(slots), -1), mode="clip")
            return gathered
        for patch, dtype, target in zip(patches, dtypes, gathered.numpy(), strict=True):
            array = slab.tensors[key].numpy() if dtype is None else slab.narrow(key, dtype)
            np.copyto(target, array[patch.slot], casting="unsafe")
        return gathered

    def _transform_item(self, patch: DrawnPatch, item: dict[str, Any]) -> Any:
        ticket, draw = patch.ticket, patch.draw
        key = (ticket.epoch, ticket.volume, ticket.occurrence, draw.patch, draw.repeat)
        self._reseed_item(seed_sequence(self._seed, ITEM, *key))
        return item if self._item_transform is None else self._item_transform(item)


@contextmanager
def _adding_to(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - start


def _with_keys(batch: Any, more: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(batch, MutableMapping):
        raise TypeError(
            f"collate_fn gave a {type(batch).__name__}; prioritized draws put {', '.join(more)} into the batch, and "
            "need a dictionary."
        )
    batch.update(more)
    return batch


def _with_meta(batch: torch.Tensor, key: str, patches: Sequence[DrawnPatch]) -> MetaTensor:
    """A batch with the metadata that MONAI's own collation gives it."""
    metas = [(patch.record.meta[key], patch.draw.patch) for patch in patches]
    rows = [(meta, number) for meta, number in metas if isinstance(meta, MetaRows)]
    attributes = MetaRows.joined(rows, batch.ndim - 1) if len(rows) == len(metas) else None
    if attributes is None:  # MONAI's collation, called on patches of one voxel
        tiny = (torch.empty((1,) * (batch.ndim - 1)) for _ in patches)
        parts = [_meta_tensor(t, p.record.attributes(key, p.draw.patch)) for t, p in zip(tiny, patches, strict=True)]
        attributes = vars(collate_meta_tensor_fn(parts))
    return _meta_tensor(batch, attributes)


def _meta_tensor(data: torch.Tensor, attributes: dict[str, Any]) -> MetaTensor:
    tensor = data.as_subclass(MetaTensor)
    tensor.__dict__.update(attributes)
    return tensor


def _item(arrays: Mapping[str, torch.Tensor], index: int, patch: DrawnPatch) -> dict[str, Any]:
    """One patch by itself, in memory of its own."""
    record, number = patch.record, patch.draw.patch
    item: dict[str, Any] = {}
    for key in record.keys:
        if key not in arrays:
            item[key] = own_copy(record.value(key, number))
        elif key in record.meta:
            item[key] = _meta_tensor(arrays[key][index].clone(), record.attributes(key, number))
        else:
            item[key] = arrays[key][index].clone()
    return item
