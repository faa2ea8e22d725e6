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
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: Any) -> Any:
        """Start copying a batch's tensors."""
        with self.stream():
            return _map_tensors(batch, self._move)

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(self.device, non_blocking=True)
        # Patches come in the file's order of axes. A GPU changes that in no time.
        return moved.contiguous() if self._stream is not None else moved

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
