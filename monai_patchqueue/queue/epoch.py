# SPDX-License-Identifier: Apache-2.0
"""An epoch under way, and its volumes that are in preparation or in the queue."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .errors import Failure
from .record import VolumeRecord
from .schedule import Draw, Draws, EpochPlan, Ticket

__all__ = ["DrawnPatch", "EpochUnderWay", "QueuedVolume"]


@dataclass
class QueuedVolume:
    """A volume that has been given to a producer."""

    entry: int
    ticket: Ticket
    number: int
    left: set[int]  # patches that are still to be drawn
    source: Ticket  # the volume's own ticket, or that of the one prepared in its place
    slots: list[int] | None = None
    record: VolumeRecord | None = None
    failed: tuple[Failure, str] | None = None
    dropped: bool = False

    @property
    def untouched(self) -> bool:
        """All its patches are there or coming."""
        whole = len(self.left) == self.ticket.count
        return whole and self.failed is None and not self.dropped and self.source == self.ticket


@dataclass
class EpochUnderWay:
    """An epoch under way."""

    plan: EpochPlan
    draws: Draws | None = None
    cursor: int = 0
    volumes: dict[int, QueuedVolume] = field(default_factory=dict)  # in preparation or in the queue
    taken: set[int] = field(default_factory=set)  # entries that are or were among the volumes
    remaining: dict[int, set[int]] | None = None  # by entry, after resuming
    pending: list[Draw] = field(default_factory=list)
    batches: int = 0  # taken by the assembler
    replaced: dict[int, int] = field(default_factory=dict)  # replacements tried, by entry

    def is_for(self, plan: EpochPlan) -> bool:
        """Whether this is the epoch of ``plan`` (whose queue's length may not be settled)."""
        return replace(plan, queue_length=self.plan.queue_length) == self.plan

    def next_entry(self) -> int | None:
        """The next entry to prepare, in stream order."""
        tickets = self.plan.tickets
        while self.cursor < len(tickets):
            entry = self.cursor
            if entry not in self.taken and tickets[entry].count and self.needs(entry):
                return entry
            self.cursor += 1
        return None

    def needs(self, entry: int) -> bool:
        """Whether any patch of an entry is still to be drawn."""
        return self.remaining is None or entry in self.remaining

    def add(self, entry: int, volume: QueuedVolume) -> None:
        """Take a volume in, as one that is in preparation or prepared."""
        volume.entry = entry
        self.taken.add(entry)
        self.volumes[entry] = volume

    def patches_of(self, entry: int) -> set[int]:
        """The patches of an entry that are still to be drawn."""
        if self.remaining is not None:
            return set(self.remaining[entry])
        return set(range(self.plan.tickets[entry].count))


@dataclass(frozen=True)
class DrawnPatch:
    """A patch of the next batch: where it lies and what is known of it."""

    ticket: Ticket
    draw: Draw
    slot: int
    record: VolumeRecord
