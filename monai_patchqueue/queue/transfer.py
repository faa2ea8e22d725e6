# SPDX-License-Identifier: Apache-2.0
"""Batches on their way to a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["Transfer"]


class Transfer:
    """Copies batches to a device, beside what that is busy with.

    On CUDA the copies run on a stream of their own; from page-locked memory, which torch does not reuse before they are
    done, nobody waits for them. The consumer's stream is made to wait for them when it gets the batch.

    Args:
        device: where to.
    """

    def __init__(self, device: torch.device) -> None:
        if device == torch.device("cuda"):
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def casts(self) -> bool:
        """Whether arrays had better be cast on the device: fewer bytes are copied to there."""
        return self.device.type != "cpu"

    def __call__(self, batch: Any) -> Any:
        """Start copying a batch's tensors, but for those that are there."""
        with self.stream():
            return _map_tensors(batch, lambda tensor: tensor if tensor.device == self.device else self._move(tensor))

    def move(self, array: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Start copying one tensor, and have it cast to ``dtype`` there."""
        with self.stream():
            return self._move(array, dtype)

    def _move(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        moved = tensor.to(self.device, non_blocking=True)
        # Patches come in the file's order of axes. A GPU changes that in no time, and casts them on the way.
        on_gpu = self._stream is not None
        if dtype is not None and dtype != moved.dtype:
            moved = moved.to(dtype, memory_format=torch.contiguous_format if on_gpu else torch.preserve_format)
        return moved.contiguous() if on_gpu else moved

    def stream(self) -> AbstractContextManager[Any]:
        """Context in which what follows a copy runs after it."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def handover(self, batch: Any) -> Callable[[], None] | None:
        """What the consumer's thread has to call before it uses the batch; ``None`` where there is nothing to do."""
        if self._stream is None:
            return None
        done = self._stream.record_event()

        def wait() -> None:
            consumer = torch.cuda.current_stream(self.device)
            consumer.wait_event(done)
            for tensor in _tensors(batch):
                if tensor.device.type == "cuda":
                    tensor.record_stream(consumer)  # its memory is not for others before the consumer is done

        return wait


def _map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(item, function) for item in value)
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
