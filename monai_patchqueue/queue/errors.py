# SPDX-License-Identifier: Apache-2.0
"""A producer's failure, carried to the consumer and raised there."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

__all__ = ["Failure", "VolumeFailedError", "WorkerDiedError"]


class WorkerDiedError(RuntimeError):
    """A worker ended while it prepared a volume."""


class VolumeFailedError(Exception):
    """Carries the exception that the consumer is to see."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class _Verbatim(str):
    """``KeyError`` prints its message's repr, in which line breaks would not be seen."""

    __repr__ = str.__str__


def _message(error: BaseException) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


@dataclass(frozen=True)
class Failure:
    """What went wrong with a volume, in a form that crosses processes.

    Args:
        kind: the exception's class.
        message: its message.
        trace: the worker's traceback as text; empty where the worker could not give one.
    """

    kind: type[BaseException]
    message: str
    trace: str = ""

    @staticmethod
    def of(error: BaseException) -> Failure:
        """The failure that ``error``, caught in a worker, stands for."""
        message, cause = _message(error), error.__cause__
        while cause is not None:  # MONAI's own message says only which transform it was
            message, cause = f"{message}: {type(cause).__name__}: {_message(cause)}", cause.__cause__
        return Failure(type(error), message, "".join(traceback.format_exception(error)))

    def exception(self, volume: str, worker: str) -> BaseException:
        """An exception of the same class whose message names volume and worker and ends with the worker's traceback."""
        return self.exception_after(f"{volume} could not be prepared ({worker})")

    def exception_after(self, head: str) -> BaseException:
        """An exception of the same class whose message begins with ``head`` and ends with the worker's traceback."""
        text = f"{head}: {self.kind.__name__}: {self.message}"
        if self.trace:
            text += f"\n\nThe worker's traceback:\n{self.trace}"
        if not issubclass(self.kind, Exception) or issubclass(self.kind, (StopIteration, StopAsyncIteration)):
            return RuntimeError(text)  # else it would end the consumer, or its epoch, as if all were well
        # Only plain built-in and our own classes surely take a single message: numpy's MemoryError does not.
        for kind in self.kind.__mro__[: self.kind.__mro__.index(Exception)]:
            try:
                error: BaseException = kind(_Verbatim(text) if issubclass(kind, KeyError) else text)
            except Exception:
                continue
            return error
        return RuntimeError(text)
