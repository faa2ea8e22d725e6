# SPDX-License-Identifier: Apache-2.0
"""The slab: one preallocated buffer per key, ``[slots, *patch]``, in memory that workers and consumer share.

Patches lie in it in the order of axes that the first patch has in memory. NIfTI files are Fortran-ordered, and bringing
a patch into C order costs five times what copying it does.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import shared_memory
from typing import Any

import numpy as np
import torch

__all__ = ["HAS_MEMFD", "KeySpec", "Slab", "SlabHandle", "SlabInfo", "SlabLayout", "bits", "slots_needed"]

HAS_MEMFD = hasattr(os, "memfd_create")

# Keys start at a page, so that no two keys share one.
_ALIGN = 4096
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class KeySpec:
    """Shape and dtype of a patch's array under one key; ``meta`` where it is a ``MetaTensor``.

    ``order`` has its axes from the slowest to the fastest in memory. Patches in other orders fit all the same.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    meta: bool = False
    order: tuple[int, ...] | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of one patch."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """``flat`` as a tensor ``[n, *shape]`` of which each ``[*shape]`` has the axes in memory as ``order`` says."""
        if self.order is None:
            return flat.view(-1, *self.shape)
        places = [self.order.index(axis) + 1 for axis in range(len(self.shape))]
        return flat.view(-1, *(self.shape[axis] for axis in self.order)).permute(0, *places)

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}{' MetaTensor' if self.meta else ''}"


@dataclass(frozen=True)
class SlabLayout:
    """Where each key's patches lie in a slab of ``slots`` slots."""

    slots: int
    keys: Mapping[str, KeySpec]

    @property
    def patch_nbytes(self) -> int:
        """Bytes of one patch, all keys together."""
        return sum(spec.nbytes for spec in self.keys.values())

    @cached_property
    def nbytes(self) -> int:
        """Size of the slab in bytes."""
        return sum(self._sizes())

    def flat(self, buffer: memoryview | mmap.mmap) -> dict[str, torch.Tensor]:
        """A tensor of one axis per key over ``buffer``, with the key's patches one after the other."""
        tensors = {}
        offset = 0
        for (key, spec), size in zip(self.keys.items(), self._sizes(), strict=True):
            count = self.slots * math.prod(spec.shape)
            tensors[key] = torch.frombuffer(buffer, dtype=spec.dtype, count=count, offset=offset)
            offset += size
        return tensors

    def _sizes(self) -> list[int]:
        return [-(-self.slots * spec.nbytes // _ALIGN) * _ALIGN for spec in self.keys.values()]


class SlabHandle:
    """The shared memory behind a slab, from before its size is known.

    With ``memfd_create`` it is one anonymous file, made before workers start, sized when the first volume's patches are
    known: independent of the size of ``/dev/shm``, and gone with its last process however that ends. Elsewhere (macOS,
    Windows) plain shared memory serves, found by its name. Can be passed to a child process under any start method.

    Args:
        shared: ``False`` for memory of this process alone (inline and thread producers).
        memfd: use ``memfd_create``; the default where there is one.
    """

    def __init__(self, *, shared: bool = True, memfd: bool = HAS_MEMFD) -> None:
        self._shared = shared
        self._fd: int | None = os.memfd_create("monai_patchqueue", os.MFD_CLOEXEC) if shared and memfd else None
        self._memory: shared_memory.SharedMemory | None = None
        self._owner = True

    def allocate(self, nbytes: int) -> memoryview | mmap.mmap:
        """Size the memory and map it; called once, by the process that made the handle."""
        nbytes = max(nbytes, 1)
        if not self._shared:
            return mmap.mmap(-1, nbytes)
        if self._fd is not None:
            os.ftruncate(self._fd, nbytes)
            return mmap.mmap(self._fd, nbytes)
        self._memory = shared_memory.SharedMemory(create=True, size=nbytes)
        return _buffer(self._memory)

    @property
    def name(self) -> str | None:
        """Name under which plain shared memory is found; ``None`` for a memfd."""
        return self._memory.name if self._memory else None

    @staticmethod
    def take_over(name: str) -> SlabHandle:
        """Plain shared memory that another process has made, and that is this one's to close."""
        handle = SlabHandle(memfd=False)
        handle._memory = shared_memory.SharedMemory(name=name)
        return handle

    def buffer(self) -> memoryview:
        """Plain shared memory's content."""
        if self._memory is None:
            raise RuntimeError("there is no plain shared memory behind this handle.")
        return _buffer(self._memory)

    def attach(self, nbytes: int, name: str | None) -> memoryview | mmap.mmap:
        """Map the memory in another process, once its size (and, without a memfd, its name) is known."""
        if self._fd is not None:
            return mmap.mmap(self._fd, max(nbytes, 1))
        self._memory = _attach_untracked(name)
        return _buffer(self._memory)

    def close(self) -> None:
        """Give the memory back; views of it stay valid until they are gone."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self._memory is not None:
            if self._owner:
                self._memory.unlink()
            # Tensors over the buffer keep the mapping alive; SharedMemory's own finalizer would complain about them.
            self._memory._buf = None  # type: ignore[attr-defined]
            self._memory._mmap = None  # type: ignore[attr-defined]
            self._memory.close()
            self._memory = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self._fd is None:
            return _rebuild_handle, (self._shared, None)
        from multiprocessing.reduction import DupFd

        return _rebuild_handle, (self._shared, DupFd(self._fd))


def _rebuild_handle(shared: bool, duplicate: Any) -> SlabHandle:
    handle = SlabHandle.__new__(SlabHandle)
    handle._shared = shared
    handle._fd = None if duplicate is None else duplicate.detach()
    handle._memory = None
    handle._owner = False
    return handle


def _buffer(memory: shared_memory.SharedMemory) -> memoryview:
    if memory.buf is None:
        raise RuntimeError("the slab's shared memory was closed.")
    return memory.buf


def _attach_untracked(name: str | None) -> shared_memory.SharedMemory:
    if sys.version_info >= (3, 13):
        return shared_memory.SharedMemory(name=name, track=False)
    # Here the resource tracker also registers attached memory, and would unlink it when a worker ends.
    from multiprocessing import resource_tracker

    register = resource_tracker.register
    resource_tracker.register = lambda *_: None
    try:
        return shared_memory.SharedMemory(name=name)
    finally:
        resource_tracker.register = register


class Slab:
    """Slots for patches, one buffer a key.

    Args:
        handle: the memory.
        layout: what lies in it.
        name: name of plain shared memory, in a process that attaches.
        attach: map memory that another process has allocated.

    Example:
        >>> layout = SlabLayout(slots=4, keys={"image": KeySpec((1, 8, 8), torch.float32)})
        >>> slab = Slab(SlabHandle(shared=False), layout)
        >>> slab.tensors["image"].shape
        torch.Size([4, 1, 8, 8])
    """

    def __init__(
        self, handle: SlabHandle, layout: SlabLayout, *, name: str | None = None, attach: bool = False
    ) -> None:
        self.layout = layout
        buffer = handle.attach(layout.nbytes, name) if attach else handle.allocate(layout.nbytes)
        flat = layout.flat(buffer)
        self.tensors = {key: spec.view(flat[key]) for key, spec in layout.keys.items()}
        # numpy copies in one thread. Those of torch wait for each other, which takes long where cores are busy.
        self.arrays = {key: bits(tensor) for key, tensor in self.tensors.items()}
        # Rows of bytes, for gathering: numpy takes rows of any dtype in one call.
        self.rows = {key: tensor.view(torch.uint8).numpy().reshape(layout.slots, -1) for key, tensor in flat.items()}
        self._narrow: dict[tuple[str, np.dtype[Any]], np.ndarray[Any, Any]] = {}

    def narrow(self, key: str, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """The slots as arrays of a dtype of fewer bytes, ``[slots, *shape]``, which fill the first bytes of each.

        The rest is not touched, and costs no memory.
        """
        if (key, dtype) not in self._narrow:
            spec = self.layout.keys[key]
            steps = spec.view(torch.empty(math.prod(spec.shape), device="meta")).stride()[1:]
            strides = (spec.nbytes, *(step * dtype.itemsize for step in steps))
            shape = (self.layout.slots, *spec.shape)
            self._narrow[key, dtype] = np.ndarray(shape, dtype, self.rows[key], strides=strides)
        return self._narrow[key, dtype]


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """An array over a tensor's memory (if it is in main memory), of integers, as numpy does not know all its dtypes."""
    integer = _INTEGERS.get(tensor.dtype.itemsize)
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    return (tensor if integer is None else tensor.view(integer)).numpy()


@dataclass(frozen=True)
class SlabInfo:
    """The slab, and the name of the volume whose patches decided its layout."""

    slab: Slab
    first: str


def slots_needed(queue_length: int, num_workers: int, max_count: int, batch_size: int) -> int:
    """Slots for the window, for a volume per worker and one that enters the window, and for the batch being copied.

    Example:
        >>> slots_needed(queue_length=64, num_workers=2, max_count=8, batch_size=4)
        92
    """
    return queue_length + (num_workers + 1) * max_count + batch_size
