# SPDX-License-Identifier: Apache-2.0
"""An epoch under way, and its volumes that are in preparation or in the queue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import Failure
from .record import Patch, VolumeRecord
from .schedule import Draw, Drawing, Plan, Ticket

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
    loose: list[Patch] | None = None  # patches that don't fit the slots, in memory of their own
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

    plan: Plan
    draws: Drawing | None = None
    cursor: int = 0
    volumes: dict[int, QueuedVolume] = field(default_factory=dict)  # in preparation or in the queue
    taken: set[int] = field(default_factory=set)  # entries that are or were among the volumes
    remaining: Callable[[int], set[int]] | None = None  # an entry's patches that were left to be drawn, after resuming
    pending: list[Draw] = field(default_factory=list)
    batches: int = 0  # taken by the assembler
    replaced: dict[int, int] = field(default_factory=dict)  # replacements tried, by entry
    over: bool = False

    @staticmethod
    def after(plan: Plan, batches: int, batch_size: int) -> EpochUnderWay:
        """An epoch of which so many batches were taken in an earlier run."""
        epoch = EpochUnderWay(plan, batches=batches)
        if batches:
            # A state says how long the queue is, so which volumes are needed is known before the slab is laid out.
            drawing = plan.drawing(batches, batch_size)
            epoch.remaining, epoch.cursor = drawing.remaining(), drawing.first_entry
        return epoch

    def start_draws(self, queue_length: int, batch_size: int) -> None:
        """Settle what is drawn, now that the queue's length is known."""
        self.plan = self.plan.with_length(queue_length)
        self.draws = self.plan.drawing(self.batches, batch_size)
        if self.batches:
            self.remaining = self.draws.remaining()

    def is_for(self, plan: Plan, queue_length: int) -> bool:
        """Whether this is the epoch of ``plan`` (whose queue's length may not be settled)."""
        return plan.with_length(queue_length) == self.plan.with_length(queue_length)

    def next_entry(self) -> int | None:
        """The next entry to prepare, in stream order."""
        while not self.over and (ticket := self.plan.ticket(self.cursor)) is not None:
            entry = self.cursor
            if entry not in self.taken and ticket.count and self.needs(entry):
                return entry
            self.taken.discard(entry)  # never looked at again
            self.cursor += 1
        return None

    def needs(self, entry: int) -> bool:
        """Whether any patch of an entry is still to be drawn."""
        return self.remaining is None or bool(self.remaining(entry))

    def add(self, entry: int, volume: QueuedVolume) -> None:
        """Take a volume in, as one that is in preparation or prepared."""
        volume.entry = entry
        self.taken.add(entry)
        self.volumes[entry] = volume

    def replacement(self, volume: QueuedVolume) -> Ticket | None:
        """Another volume to prepare in place of one that failed; ``None`` when all have."""
        attempt = self.replaced.get(volume.entry, 0)
        source = self.plan.replacement(volume.entry, attempt)
        if source is not None:
            self.replaced[volume.entry] = attempt + 1
        return source

    def source(self, entry: int, ticket: Ticket) -> Ticket:
        """What is prepared for an entry: its own volume, or the one that took its place in an earlier run."""
        tried = self.replaced.get(entry, 0)
        return (self.plan.replacement(entry, tried - 1) if tried else None) or ticket

    def next_patches(self, batch_size: int, least: int) -> list[DrawnPatch] | None:
        """The next batch, at ``least`` so many patches; ``None`` while some are not there yet, none at the end."""
        if self.draws is None or not (self.pending or self.draws.ready):
            return None
        while len(self.pending) < batch_size and (draw := next(self.draws, None)) is not None:
            self.pending.append(draw)
        if len(self.pending) < least:
            return []
        patches = []
        for draw in self.pending:
            volume = self.volumes.get(draw.entry)
            if volume is None or volume.record is None or volume.slots is None:
                return None
            loose = volume.loose[draw.patch] if volume.loose else None
            patches.append(DrawnPatch(volume.source, draw, volume.slots[draw.patch], volume.record, loose))
        if any(self.volumes[entry].record is None for entry, _ in self.draws.leaving()):
            return None  # what leaves has to have come first
        return patches

    def patches_of(self, entry: int) -> set[int]:
        """The patches of an entry that are still to be drawn."""
        if self.remaining is not None:
            return self.remaining(entry)
        ticket = self.plan.ticket(entry)
        return set(range(ticket.count)) if ticket else set()


@dataclass(frozen=True)
class DrawnPatch:
    """A patch of the next batch: where it lies and what is known of it."""

    ticket: Ticket
    draw: Draw
    slot: int
    record: VolumeRecord
    loose: Patch | None = None
