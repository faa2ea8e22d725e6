# SPDX-License-Identifier: Apache-2.0
"""Waking a thread that waits for connections, without letting it run first."""

from __future__ import annotations

import ctypes
import socket
import threading
from collections.abc import Callable

__all__ = ["Waker"]


class Waker:
    """Ends :func:`multiprocessing.connection.wait` in another thread, where it is one of the objects waited for.

    Whoever calls :meth:`wake` goes on at once. While ``socket.send`` or ``os.write`` runs, the interpreter's lock is
    free, and the thread that it wakes up takes it: a training loop would wait until that one has assembled a batch.

    Example:
        >>> from multiprocessing.connection import wait
        >>> waker = Waker()
        >>> waker.wake()
        >>> waker.wake()
        >>> wait([waker]) == [waker], waker.rest(), wait([waker], timeout=0)
        (True, None, [])
        >>> waker.close()
    """

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._lock = threading.Lock()
        self._awake = False
        self._closed = False

    def fileno(self) -> int:
        """What there is to read from after :meth:`wake`, until :meth:`rest`."""
        return self._receiver.fileno()

    def wake(self) -> None:
        """End the wait that is under way, or the next one; from any thread, also after :meth:`close`."""
        with self._lock:
            if not self._awake and not self._closed:
                self._awake = True
                _send(self._sender)

    def rest(self) -> None:
        """Let the next wait last until :meth:`wake` is called again. What was noted before that call is seen now."""
        self._receiver.recv(1)
        self._awake = False  # not under the lock, which might let the other thread wait

    def close(self) -> None:
        """Give the sockets back."""
        with self._lock:
            self._closed = True
            self._receiver.close()
            self._sender.close()


def _send_byte() -> Callable[[socket.socket], object]:
    try:
        write = ctypes.PyDLL(None).write  # C's own, called with the interpreter's lock held
    except (AttributeError, OSError, TypeError):  # Windows
        return lambda sender: sender.send(b"\0")
    write.argtypes, write.restype = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t), ctypes.c_ssize_t
    return lambda sender: write(sender.fileno(), b"\0", 1)


_send = _send_byte()
