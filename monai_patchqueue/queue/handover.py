# SPDX-License-Identifier: Apache-2.0
"""Items that go from one process to another by shared memory.

An item is pickled with its arrays left out. Pickle and arrays lie in a segment of shared memory, on which the receiver
builds the item without copying. A segment is written to again only when nothing on the receiver's side refers to it any
more: writing to memory for the first time costs many times what writing to it again does.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor

from .pickling import describe_unpicklable
from .slab import HAS_MEMFD, SlabHandle

__all__ = ["Acknowledgement", "Parcel", "Receiver", "Sender"]

# Smaller arrays cost less inside the pickle.
_LEAST_NBYTES = 4096
# A cache line, and more than any dtype needs.
_ALIGN = 64


class Parcel(NamedTuple):
    """Where an item lies.

    Args:
        number: of the segment.
        nbytes: its size, where the receiver does not know it yet.
        name: of a new segment of plain shared memory; ``None`` for a memfd, which follows the parcel through the pipe.
        spans: start and stop of the pickle and of each array.
        gone: segments that will not be used again.
    """

    number: int
    nbytes: int | None
    name: str | None
    spans: tuple[tuple[int, int], ...]
    gone: tuple[int, ...]


class Acknowledgement(NamedTuple):
    """A parcel was taken.

    Args:
        free: segments to which nothing refers any more.
        dropped: segments that the receiver has given back to the system.
    """

    free: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()


@dataclass
class _Segment:
    content: np.ndarray[Any, Any]
    file: int | None = None
    plain: SlabHandle | None = None


class Sender:
    """Puts items into segments, and tells the other side through a pipe.

    Args:
        connection: the pipe; two-way.
        memfd: use ``memfd_create``; the default where there is one.
    """

    def __init__(self, connection: Connection[Any, Any], memfd: bool = HAS_MEMFD) -> None:
        self._connection = connection
        self._memfd = memfd
        self._segments: dict[int, _Segment] = {}
        self._free: list[int] = []
        self._count = 0

    def send(self, item: Any) -> None:
        """Send an item.

        Raises:
            TypeError: an item that cannot be pickled.
        """
        try:
            content, arrays = _pickle(item)
        except Exception as error:
            raise TypeError(f"an item's {describe_unpicklable(item)} cannot be pickled: {error}") from error
        parts: list[Any] = [np.frombuffer(content, np.uint8), *(np.frombuffer(a.raw(), np.uint8) for a in arrays)]
        spans, end = [], 0
        for part in parts:
            start = -(-end // _ALIGN) * _ALIGN
            end = start + part.nbytes
            spans.append((start, end))
        number, is_new, gone = self._take(end)
        segment = self._segments[number]
        for part, (start, stop) in zip(parts, spans, strict=True):
            segment.content[start:stop] = part
        name = segment.plain.name if segment.plain is not None and is_new else None
        parcel = Parcel(number, segment.content.nbytes if is_new else None, name, tuple(spans), gone)
        self._connection.send_bytes(pickle.dumps(parcel))
        if segment.file is not None:
            send_handle(self._connection, segment.file, None)
            os.close(segment.file)  # the mapping stays
            segment.file = None

    def acknowledged(self, message: Acknowledgement) -> None:
        """Hear of a parcel that was taken."""
        self._free += message.free
        for number in message.dropped:
            del self._segments[number]

    def _take(self, nbytes: int) -> tuple[int, bool, tuple[int, ...]]:
        """A segment of at least ``nbytes``, whether it is new, and the one that makes way for it."""
        fitting = [number for number in self._free if self._segments[number].content.nbytes >= nbytes]
        if fitting:
            number = min(fitting, key=lambda number: self._segments[number].content.nbytes)
            self._free.remove(number)
            return number, False, ()
        gone = tuple(self._free[:1])  # all free ones are too small, and are exchanged one by one
        for number in gone:
            self._free.remove(number)
            del self._segments[number]
        self._count += 1
        self._segments[self._count] = self._segment(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        return self._count, True, gone

    def _segment(self, nbytes: int) -> _Segment:
        if not self._memfd:
            handle = SlabHandle(memfd=False)
            return _Segment(np.frombuffer(handle.allocate(nbytes), np.uint8, nbytes), plain=handle)
        file = os.memfd_create("monai_patchqueue", os.MFD_CLOEXEC)
        os.ftruncate(file, nbytes)
        return _Segment(_map(file, nbytes).numpy(), file)


class Receiver:
    """Builds the items that a :class:`Sender` sends, on the memory in which they lie.

    An item keeps its segment: each array of it, and each view of one, refers to an object whose end frees the segment.

    Args:
        connection: the pipe.
        keep: free segments that are kept for being written to again; others go back to the system.
    """

    def __init__(self, connection: Connection[Any, Any], keep: int) -> None:
        self._connection = connection
        self._keep = keep
        self._segments: dict[int, torch.Tensor] = {}
        self._free: set[int] = set()
        self._released: deque[tuple[int, int]] = deque()

    def receive(self, parcel: Parcel) -> tuple[Any, Acknowledgement]:
        """An item, and what the sender is to be told."""
        for number in parcel.gone:
            self._free.discard(number)
            del self._segments[number]
        if parcel.nbytes is not None:
            self._segments[parcel.number] = self._attach(parcel.nbytes, parcel.name)
        self._free.discard(parcel.number)
        owner = self._segments[parcel.number].numpy()
        finalizer = weakref.finalize(owner, self._released.append, (parcel.number, _forks))
        finalizer.atexit = False
        content, *arrays = (owner[start:stop] for start, stop in parcel.spans)
        return pickle.loads(content.data, buffers=arrays), self._acknowledge()

    @staticmethod
    def discard(parcel: Parcel) -> None:
        """Give back the memory of a parcel that nobody will take, if its sender is dead."""
        if parcel.name is not None:
            SlabHandle.take_over(parcel.name).close()

    def _attach(self, nbytes: int, name: str | None) -> torch.Tensor:
        if name is not None:
            handle = SlabHandle.take_over(name)
            mapped = torch.frombuffer(handle.buffer(), dtype=torch.uint8, count=nbytes)
            handle.close()  # the name is not needed any more; the mapping stays
            return mapped
        file = recv_handle(self._connection)
        try:
            return _map(file, nbytes)
        finally:
            os.close(file)

    def _acknowledge(self) -> Acknowledgement:
        free, dropped = [], []
        while self._released:
            number, forks = self._released.popleft()
            if forks == _forks and len(self._free) < self._keep:
                self._free.add(number)
                free.append(number)
            else:  # a process that was forked meanwhile may still use it
                del self._segments[number]
                dropped.append(number)
        return Acknowledgement(tuple(free), tuple(dropped))


def _map(file: int, nbytes: int) -> torch.Tensor:
    # An mmap object would keep a file descriptor open for each segment; torch's mapping does not.
    return torch.from_file(f"/proc/self/fd/{file}", shared=True, size=nbytes, dtype=torch.uint8)


# How often this process was forked: children share the segments that are mapped, and are not asked what they use.
_forks = 0


def _count_forks() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_count_forks)


class _Pickler(pickle.Pickler):
    """Leaves the content of tensors and arrays out."""

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is MetaTensor:
            plain = obj.as_tensor()
            return NotImplemented if plain.requires_grad else (_meta_tensor, (plain, vars(obj)))
        if kind is not torch.Tensor or obj.layout is not torch.strided or obj.device.type != "cpu":
            return NotImplemented
        if obj.requires_grad or obj.is_quantized:
            return NotImplemented
        # Axes in the order of memory: what a reader left in a file's own order needs no reordering.
        axes = sorted(range(obj.ndim), key=lambda axis: -obj.stride(axis))
        dense = obj.resolve_conj().resolve_neg().permute(axes).contiguous()
        content = pickle.PickleBuffer(dense.reshape(-1).view(torch.uint8).numpy())
        return _tensor, (content, obj.dtype, tuple(dense.shape), tuple(axes))


def _pickle(item: Any) -> tuple[bytes, list[pickle.PickleBuffer]]:
    buffers: list[pickle.PickleBuffer] = []

    def out_of_band(buffer: pickle.PickleBuffer) -> bool:
        if buffer.raw().nbytes < _LEAST_NBYTES:
            return True  # stays in the pickle
        buffers.append(buffer)
        return False

    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL, buffer_callback=out_of_band).dump(item)
    return stream.getvalue(), buffers


def _tensor(content: Any, dtype: torch.dtype, shape: Sequence[int], axes: Sequence[int]) -> torch.Tensor:
    flat = torch.frombuffer(content, dtype=dtype) if len(content) else torch.empty(0, dtype=dtype)
    return flat.view(shape).permute([axes.index(axis) for axis in range(len(axes))])


def _meta_tensor(data: torch.Tensor, attributes: dict[str, Any]) -> MetaTensor:
    tensor = data.as_subclass(MetaTensor)
    tensor.__dict__.update(attributes)
    return tensor
