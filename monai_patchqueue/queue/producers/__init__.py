# SPDX-License-Identifier: Apache-2.0
"""Who prepares volumes: the calling thread, threads, processes, or an executor of the user's."""

from .base import (
    Assignment,
    Event,
    Failed,
    InlineProducer,
    InMemory,
    NeedsSlots,
    Producer,
    Written,
)
from .executors import ExecutorProducer
from .processes import ProcessProducer
from .threads import ThreadProducer

__all__ = [
    "Assignment",
    "Event",
    "ExecutorProducer",
    "Failed",
    "InMemory",
    "InlineProducer",
    "NeedsSlots",
    "ProcessProducer",
    "Producer",
    "ThreadProducer",
    "Written",
]
