# SPDX-License-Identifier: Apache-2.0
"""The queue itself: follows the schedule, keeps producers busy, and knows what lies in which slot.

A state machine for one thread. It decides nothing that the schedule has not decided: who prepares a volume, and when,
changes only how long a batch takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .errors import Failure
from .producers import Assignment, Event, Failed, InMemory, NeedsSlots, Producer, Written
from .record import VolumeRecord, array_specs
from .schedule import Draw, Draws, EpochPlan, Ticket
from .slab import KeySpec, Slab, SlabHandle, SlabInfo, SlabLayout
from .stats import Recorder
from .worker import PreparedVolume, write

__all__ = ["DrawnPatch", "PatchQueue", "VolumeFailedError"]


class VolumeFailedError(Exception):
    """Carries the exception that the consumer is to see."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class DrawnPatch:
    """A patch of the next batch: where it lies and what is known of it."""

    ticket: Ticket
    draw: Draw
    slot: int
    record: VolumeRecord


@dataclass
class _Volume:
    """A volume that has been given to a producer."""

    ticket: Ticket
    number: int
    left: set[int]  # patches that are still to be drawn
    slots: list[int] | None = None
    record: VolumeRecord | None = None
    failed: tuple[Failure, str] | None = None
    dropped: bool = False

    @property
    def untouched(self) -> bool:
        """All its patches are there or coming."""
        return self.failed is None and not self.dropped and len(self.left) == self.ticket.count


@dataclass
class _Epoch:
    """An epoch under way."""

    plan: EpochPlan
    draws: Draws | None = None
    cursor: int = 0
    volumes: dict[int, _Volume] = field(default_factory=dict)  # in preparation or in the queue
    taken: set[int] = field(default_factory=set)  # entries that are or were among the volumes
    remaining: dict[int, set[int]] | None = None  # by entry, after resuming
    pending: list[Draw] = field(default_factory=list)
    batches: int = 0  # taken by the assembler

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

    def add(self, entry: int, volume: _Volume) -> None:
        """Take a volume in, as one that is in preparation or prepared."""
        self.taken.add(entry)
        self.volumes[entry] = volume

    def patches_of(self, entry: int) -> set[int]:
        """The patches of an entry that are still to be drawn."""
        if self.remaining is not None:
            return set(self.remaining[entry])
        return set(range(self.plan.tickets[entry].count))


class PatchQueue:
    """Volumes in preparation, patches in slots, batches in order.

    Args:
        producer: who prepares volumes.
        handle: memory for the slab.
        batch_size: patches per batch.
        drop_last: leave out an epoch's last, smaller batch.
        max_count: the largest number of patches that any volume gives.
        length: from the bytes of a patch, the queue's length in patches.
        volume_name: a volume's name, for messages.
        recorder: where statistics are kept.
    """

    def __init__(
        self,
        producer: Producer,
        handle: SlabHandle,
        *,
        batch_size: int,
        drop_last: bool,
        max_count: int,
        length: Callable[[int], int],
        volume_name: Callable[[int], str],
        recorder: Recorder,
    ) -> None:
        self.info: SlabInfo | None = None
        self.queue_length = 0
        self._producer = producer
        self._handle = handle
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._max_count = max_count
        self._length = length
        self._volume_name = volume_name
        self._recorder = recorder
        self._current: _Epoch | None = None
        self._upcoming: _Epoch | None = None
        self._free: list[int] = []
        self._in_flight: dict[int, _Volume] = {}
        self._numbers = 0
        self._waiting: dict[int, dict[str, KeySpec]] = {}
        self._in_memory: dict[int, PreparedVolume] = {}
        self._prepared: dict[Ticket, PreparedVolume] = {}
        self._failed: list[_Volume] = []
        self._ready = 0

    # -- epochs

    def offer(self, ticket: Ticket, volume: PreparedVolume) -> None:
        """Take a volume that has been prepared already, to find out what patches look like."""
        self._prepared[ticket] = volume

    def open(self, plan: EpochPlan, following: EpochPlan | None, batches: int = 0) -> None:
        """Begin an epoch, after ``batches`` batches that were drawn in an earlier run.

        What is prepared already, of this epoch and the following one, is kept where it still occurs.
        """
        kept: dict[Ticket, _Volume] = {}
        for epoch in (self._current, self._upcoming):
            for volume in epoch.volumes.values() if epoch else ():
                kept[volume.ticket] = volume
        self._current = self._new_epoch(plan, batches)
        self._upcoming = self._new_epoch(following, 0) if following else None
        before = 0
        for epoch in (self._current, self._upcoming):
            if epoch is not None:
                self._adopt(epoch, kept, before)
                before += epoch.plan.starts[-1]
        for volume in kept.values():
            self._drop(volume)
        self._failed = [volume for volume in self._failed if not volume.dropped]

    def _new_epoch(self, plan: EpochPlan, batches: int) -> _Epoch:
        if self.info is not None:
            plan = replace(plan, queue_length=self.queue_length)
        epoch = _Epoch(plan, batches=batches)
        if batches:
            # Which volumes are needed does not depend on the queue's final length having been settled only if it is
            # given; else the slab's layout comes first, and `_start_draws` catches up.
            epoch.remaining = Draws(plan).advance(self._drawn_after(batches, plan)).remaining()
        if self.info is not None:
            self._start_draws(epoch)
        return epoch

    def _drawn_after(self, batches: int, plan: EpochPlan) -> int:
        return min(batches * self._batch_size, plan.num_draws)

    def _start_draws(self, epoch: _Epoch) -> None:
        epoch.plan = replace(epoch.plan, queue_length=self.queue_length)
        epoch.draws = Draws(epoch.plan)
        if epoch.batches:
            epoch.draws.advance(self._drawn_after(epoch.batches, epoch.plan))
            epoch.remaining = epoch.draws.remaining()

    def _adopt(self, epoch: _Epoch, kept: dict[Ticket, _Volume], before: int) -> None:
        """Keep prepared volumes that could be there if all before them were, so that those still find slots."""
        slots = self.info.slab.layout.slots if self.info else 0
        for entry, ticket in enumerate(epoch.plan.tickets):
            volume = kept.get(ticket)
            if volume is None or not volume.untouched or not epoch.needs(entry):
                continue
            if self.info is None or before + epoch.plan.starts[entry + 1] <= slots:
                epoch.add(entry, kept.pop(ticket))
                self._keep_only(volume, epoch.patches_of(entry))

    def _keep_only(self, volume: _Volume, patches: set[int]) -> None:
        if volume.record is not None:
            self._ready += len(patches) - len(volume.left)
        volume.left = patches
        if volume.number not in self._in_flight:
            self._release(volume)

    def _drop(self, volume: _Volume) -> None:
        volume.dropped = True
        self._keep_only(volume, set())

    def _release(self, volume: _Volume) -> None:
        """Free the slots of a volume's patches that nobody will draw (any more)."""
        for patch, slot in enumerate(volume.slots or ()):
            if slot >= 0 and patch not in volume.left and volume.slots is not None:
                volume.slots[patch] = -1
                self._free.append(slot)

    # -- producing

    def fill(self, limit: int | None = None) -> None:
        """Hand out volumes in stream order as long as there is somebody to take them and room for their patches."""
        taken = 0
        while self._producer.capacity() > 0 and (limit is None or taken < limit):
            if self.info is None and len(self._in_flight) >= self._producer.num_workers:
                return
            epoch, entry = self._next()
            if epoch is None or entry is None:
                return
            ticket = epoch.plan.tickets[entry]
            slots = None
            if self.info is not None:
                if len(self._free) < ticket.count:
                    return
                slots = [self._free.pop() for _ in range(ticket.count)]
            self._numbers += 1
            volume = _Volume(ticket, self._numbers, epoch.patches_of(entry), slots)
            epoch.add(entry, volume)
            self._in_flight[volume.number] = volume
            taken += 1
            prepared = self._prepared.pop(ticket, None)
            if prepared is None:
                self._producer.submit(Assignment(volume.number, ticket, slots))
            else:
                self.handle(InMemory(volume.number, prepared))

    def _next(self) -> tuple[_Epoch | None, int | None]:
        for epoch in (self._current, self._upcoming):
            entry = epoch.next_entry() if epoch else None
            if entry is not None:
                return epoch, entry
        return None, None

    def handle(self, event: Event) -> None:
        """Take note of what a producer says."""
        volume = self._in_flight.get(event.number)
        if volume is None:
            return
        if isinstance(event, NeedsSlots):
            self._waiting[event.number] = dict(event.specs)
            self._lay_out()
        elif isinstance(event, InMemory):
            self._in_memory[event.number] = event.volume
            self._lay_out()
        elif isinstance(event, Written):
            self._landed(volume, event.record)
        else:
            del self._in_flight[volume.number]
            volume.failed = event.failure, event.worker
            self._keep_only(volume, set())
            if not volume.dropped:
                self._failed.append(volume)
            self._lay_out()

    def _landed(self, volume: _Volume, record: VolumeRecord) -> None:
        del self._in_flight[volume.number]
        volume.record = record
        self._ready += len(volume.left)
        self._release(volume)
        if not volume.dropped:
            self._recorder.prepared(record.seconds)

    def _lay_out(self) -> None:
        """Lay the slab out once the first volume in stream order is prepared, and give waiting volumes their slots."""
        if self.info is None:
            unsettled = [n for n, volume in self._in_flight.items() if not volume.dropped] or list(self._in_flight)
            first = min(unsettled, default=None)
            if first in self._in_memory:
                specs = array_specs(self._in_memory[first].patches[0])
            elif first in self._waiting:
                specs = self._waiting[first]
            else:
                return
            self._allocate(SlabSpec(specs, self._volume_name(self._in_flight[first].ticket.volume)))
        for number in list(self._waiting):
            del self._waiting[number]
            slots = self._in_flight[number].slots
            self._producer.grant(number, slots or [])
        for number in list(self._in_memory):
            self._write(self._in_flight[number], self._in_memory.pop(number))

    def _allocate(self, spec: SlabSpec) -> None:
        layout = SlabLayout(1, spec.keys)
        self.queue_length = self._length(layout.patch_nbytes)
        slots = slots_needed(self.queue_length, self._producer.num_workers, self._max_count, self._batch_size)
        self.info = SlabInfo(Slab(self._handle, replace(layout, slots=slots)), spec.first)
        self._free = list(range(slots))[::-1]
        for _, volume in sorted(self._in_flight.items()):
            volume.slots = [self._free.pop() for _ in range(volume.ticket.count)]
        for epoch in (self._current, self._upcoming):
            if epoch is not None:
                self._start_draws(epoch)
        self._producer.announce(self.info)

    def _write(self, volume: _Volume, prepared: PreparedVolume) -> None:
        if self.info is None or volume.slots is None:
            raise RuntimeError("a volume is written before the slab is laid out.")
        try:
            record = write(prepared, self.info.slab, volume.slots, self.info.first)
        except Exception as error:
            self.handle(Failed(volume.number, Failure.of(error), "in the calling process"))
        else:
            self._landed(volume, record)

    # -- drawing

    def next_batch(self) -> list[DrawnPatch] | None:
        """The patches of the next batch, once all of them are there; ``None`` before that.

        An empty list means that the epoch is over.

        Raises:
            VolumeFailedError: a volume of this epoch could not be prepared.
        """
        epoch = self._current
        if epoch is None:
            return []
        self._raise_failure(epoch)
        if not epoch.plan.num_draws:
            return []
        if epoch.draws is None:
            return None
        while len(epoch.pending) < self._batch_size and (draw := next(epoch.draws, None)) is not None:
            epoch.pending.append(draw)
        if len(epoch.pending) < (self._batch_size if self._drop_last else 1):
            self._finish(epoch)
            return []
        patches = []
        for draw in epoch.pending:
            volume = epoch.volumes.get(draw.entry)
            if volume is None or volume.record is None or volume.slots is None:
                return None
            patches.append(DrawnPatch(volume.ticket, draw, volume.slots[draw.patch], volume.record))
        return patches

    def drawn(self, patches: list[DrawnPatch]) -> None:
        """The batch has been copied out of its slots, which are free for other patches now."""
        epoch = self._current
        if epoch is None:
            return
        epoch.pending = []
        epoch.batches += 1
        for patch in patches:
            if patch.draw.last:
                volume = epoch.volumes[patch.draw.entry]
                self._keep_only(volume, volume.left - {patch.draw.patch})
                if not volume.left:
                    del epoch.volumes[patch.draw.entry]

    @property
    def ready_patches(self) -> int:
        """Patches that lie in their slots and are still to be drawn, the following epoch's included."""
        return self._ready

    def _finish(self, epoch: _Epoch) -> None:
        """Drop what an epoch has left (a batch that was too small, or draws beyond its length)."""
        for volume in epoch.volumes.values():
            self._drop(volume)
        epoch.volumes = {}
        epoch.cursor = len(epoch.plan.tickets)

    def _raise_failure(self, epoch: _Epoch) -> None:
        for volume in self._failed:
            if volume.failed is not None and volume.ticket.epoch == epoch.plan.epoch:
                failure, worker = volume.failed
                raise VolumeFailedError(failure.exception(self._volume_name(volume.ticket.volume), worker))


@dataclass(frozen=True)
class SlabSpec:
    """What patches look like, and the name of the volume that says so."""

    keys: dict[str, KeySpec]
    first: str


def slots_needed(queue_length: int, num_workers: int, max_count: int, batch_size: int) -> int:
    """Slots for the window, for a volume per worker and one that enters the window, and for the batch being copied.

    Example:
        >>> slots_needed(queue_length=64, num_workers=2, max_count=8, batch_size=4)
        92
    """
    return queue_length + (num_workers + 1) * max_count + batch_size
