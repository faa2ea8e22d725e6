# SPDX-License-Identifier: Apache-2.0
"""Processes of our own: one duplex pipe each, gone when their parent is gone, however that ends."""

from __future__ import annotations

import gc
import multiprocessing.connection as mpc
import os
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess, parent_process
from typing import Any

from .pickling import describe_unpicklable

__all__ = ["SAFETY", "describe_exit", "hang_up", "start_child"]

# This process's ends of children's pipes. A forked child inherits copies, which would keep the others from noticing
# that their parent is gone.
_parent_ends: weakref.WeakSet[Connection[Any, Any]] = weakref.WeakSet()

# A process that is forked by another thread meanwhile would keep the new child's ends open.
_fork_lock = threading.Lock()


def _forget_the_parents_lock() -> None:
    """A child is forked while the lock is held, and may start children itself."""
    global _fork_lock
    _fork_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_the_parents_lock)

#: Where some other process keeps a child's ends open all the same, its death is noticed this many seconds later.
SAFETY = 5.0


def start_child(
    context: BaseContext,
    main: Callable[..., object],
    arguments: Sequence[Any],
    *,
    name: str,
    sent: object,
    instead: str,
    own_group: bool = False,
) -> tuple[BaseProcess, Connection[Any, Any]]:
    """Start a process that runs ``main(connection, *arguments)``.

    Args:
        context: how to start it.
        main: a function at a module's top level; may end with ``EOFError`` or ``ConnectionError`` once the pipe's other
            end is closed.
        arguments: what it is called with, besides its end of the pipe.
        name: the process's name.
        sent: the argument that is the user's, for messages.
        instead: what the user can do if it cannot be pickled, for messages.
        own_group: give the process a group of its own, to which processes that it starts belong, and which ends with
            it. They are not to be daemons' children, so it is none.

    Returns:
        The process, and this process's end of the pipe.

    Raises:
        TypeError: under a start method that pickles, for what cannot be.
    """
    with _fork_lock:
        connection, child = context.Pipe(duplex=True)
        method = context.get_start_method()
        inherited = (*_parent_ends, connection) if method == "fork" else ()
        _parent_ends.add(connection)
        parent = None if method == "forkserver" else os.getpid()
        process: BaseProcess = context.Process(  # type: ignore[attr-defined]
            target=_enter,
            args=(main, arguments, child, inherited, parent, own_group),
            name=name,
            daemon=not own_group,
        )
        try:
            process.start()
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise TypeError(
                f"{describe_unpicklable(sent)} cannot be sent to a worker process started by {method!r}: {error}. "
                "Define functions at a module's top level instead of as lambdas or inside functions, or use "
                f"{instead}, or multiprocessing_context='fork' where the system has it."
            ) from error
        child.close()
    return process, connection


def _enter(
    main: Callable[..., object],
    arguments: Sequence[Any],
    connection: Connection[Any, Any],
    inherited: Sequence[Connection[Any, Any]],
    parent: int | None,
    own_group: bool,
) -> None:
    """A child process, from start to end."""
    for other in inherited:
        other.close()
    gc.freeze()  # collecting would write to, and so copy, what a fork shares with its parent
    # Ctrl-C reaches the whole process group; the consumer decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if own_group and hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, args=(parent, own_group), daemon=True).start()
    try:
        main(connection, *arguments)
    except (EOFError, ConnectionError):
        pass  # the parent has closed the pipe, or is gone
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # exit handlers are the parent's


def _end_with_parent(parent: int | None, own_group: bool) -> None:
    """End this process when its parent is gone, whatever it is doing.

    The sentinel alone does not do: under fork, siblings that were started later hold a copy of its other end.
    """
    process = parent_process()
    while process is not None:
        gone = mpc.wait([process.sentinel], timeout=1.0) or (parent is not None and os.getppid() != parent)
        if gone:
            if own_group and hasattr(os, "killpg"):
                with suppress(OSError):
                    os.killpg(os.getpid(), signal.SIGTERM)
            os._exit(1)


def describe_exit(code: int | None) -> str:
    """How a process ended, in words.

    Example:
        >>> describe_exit(-15), describe_exit(1)
        ('was killed by SIGTERM', 'ended with exit code 1')
    """
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = " (the kernel does this when memory runs out)" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    return f"ended with exit code {code}"


def hang_up(connection: Connection[Any, Any]) -> None:
    """Close this process's end of a child's pipe."""
    _parent_ends.discard(connection)
    connection.close()
