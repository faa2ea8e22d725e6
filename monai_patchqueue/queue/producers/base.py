# SPDX-License-Identifier: Apache-2.0
"""What the queue asks of whoever prepares volumes, and the inline producer, which is the simplest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import Failure
from ..record import VolumeRecord
from ..schedule import Ticket
from ..slab import KeySpec, SlabInfo
from ..worker import PreparedVolume, Preparer, Recipe

__all__ = ["Assignment", "Event", "Failed", "InMemory", "InlineProducer", "NeedsSlots", "Producer", "Written"]


class Assignment(NamedTuple):
    """A ticket under its number, with the slots for its patches where they are known already.

    There are as many slots as the ticket's count, unless its volume takes another one's place.
    """

    number: int
    ticket: Ticket
    slots: Sequence[int] | None


@dataclass(frozen=True)
class NeedsSlots:
    """A volume is prepared, but its assignment had no slots: the worker waits for :meth:`Producer.grant`."""

    number: int
    specs: Mapping[str, KeySpec]


@dataclass(frozen=True)
class InMemory:
    """A volume is prepared and in this process's memory; the queue writes it into slots."""

    number: int
    volume: PreparedVolume


@dataclass(frozen=True)
class Written:
    """A volume's patches are in their slots."""

    number: int
    record: VolumeRecord


@dataclass(frozen=True)
class Failed:
    """A volume could not be prepared; ``worker`` names who tried."""

    number: int
    failure: Failure
    worker: str


Event = NeedsSlots | InMemory | Written | Failed


class Producer(ABC):
    """Prepares volumes. All methods but :meth:`wake` are called from one thread."""

    #: Volumes that are prepared at the same time.
    num_workers: int = 1

    @abstractmethod
    def capacity(self) -> int:
        """How many assignments it can take now."""

    @abstractmethod
    def submit(self, assignment: Assignment) -> None:
        """Take an assignment."""

    @abstractmethod
    def wait(self) -> list[Event]:
        """Block until something has happened or :meth:`wake` was called."""

    @abstractmethod
    def grant(self, number: int, slots: Sequence[int]) -> None:
        """Give a volume that waits for them its slots; the slab is there by then."""

    def announce(self, info: SlabInfo) -> None:  # noqa: B027 (not every producer writes into the slab)
        """The slab has been laid out."""

    @abstractmethod
    def wake(self) -> None:
        """End a :meth:`wait` that is under way, or the next one; from any thread."""

    @abstractmethod
    def close(self) -> None:
        """Stop, without waiting for volumes in preparation."""


class InlineProducer(Producer):
    """Prepares volumes in the calling thread, one at a time, when waited for."""

    def __init__(self, recipe: Recipe) -> None:
        self._preparer = Preparer(recipe, "inline", written=True)
        self._todo: deque[Assignment] = deque()

    def capacity(self) -> int:
        return 1 - len(self._todo)

    def submit(self, assignment: Assignment) -> None:
        self._todo.append(assignment)

    def wait(self) -> list[Event]:
        if not self._todo:
            return []
        number, ticket, _ = self._todo[0]  # and there it stays if Ctrl-C ends this
        try:
            event: Event = InMemory(number, self._preparer(ticket))
        except Exception as error:
            event = Failed(number, Failure.of(error), "in the calling process")
        self._todo.popleft()
        return [event]

    def grant(self, number: int, slots: Sequence[int]) -> None:
        raise RuntimeError("an inline producer has nobody waiting for slots.")

    def wake(self) -> None:
        """Nobody waits."""

    def close(self) -> None:
        self._todo.clear()
