# SPDX-License-Identifier: Apache-2.0
"""Threads at the interpreter's end.

Python before 3.14 aborts when a daemon thread is inside C++ code while the interpreter ends.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
import time
import weakref
from typing import Protocol

__all__ = ["EndsAtExit", "end_at_exit", "interrupt"]

_SECONDS_TO_END = 5.0


class EndsAtExit(Protocol):
    """Something with a thread of its own."""

    thread: threading.Thread
    #: Whether the thread was interrupted, and will end soon.
    interrupted: bool

    def abandon(self) -> object:
        """Stop listening to the thread, and interrupt it if it is busy."""


_alive: weakref.WeakSet[EndsAtExit] = weakref.WeakSet()


def end_at_exit(worker: EndsAtExit) -> None:
    """Have a thread ended before the interpreter is."""
    _alive.add(worker)


def interrupt(thread: threading.Thread) -> None:
    """End a thread by a ``SystemExit`` when it next comes back from C to Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


@atexit.register
def _end_threads() -> None:
    deadline = time.monotonic() + _SECONDS_TO_END
    workers = list(_alive)
    for worker in workers:
        worker.abandon()
    for worker in workers:
        if worker.interrupted:
            worker.thread.join(max(deadline - time.monotonic(), 0.0))
