# SPDX-License-Identifier: Apache-2.0
"""The queue itself: follows the schedule, keeps producers busy, and knows what lies in which slot.

A state machine for one thread. It decides nothing that the schedule has not decided: who prepares a volume, and when,
changes only how long a batch takes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from .epoch import DrawnPatch, EpochUnderWay, QueuedVolume
from .errors import Failure, VolumeFailedError
from .producers import Assignment, Event, Failed, InMemory, NeedsSlots, Producer, Written
from .record import VolumeRecord, slab_specs
from .recorder import Recorder
from .schedule import Drawing, Plan, Ticket
from .slab import KeySpec, SlabHandle, SlabInfo, SlabLayout, slots_needed
from .slots import Slots
from .worker import PreparedVolume

__all__ = ["PatchQueue"]

logger = logging.getLogger(__name__)


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
        replace_failed: prepare another volume in place of one that fails, instead of ending the epoch with an error.
        keep_misfits: keep patches of other shapes or dtypes than the first volume's in memory of their own, instead of
            ending the epoch with an error.
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
        replace_failed: bool = False,
        keep_misfits: bool = False,
    ) -> None:
        self.queue_length = 0
        self._producer = producer
        self._slots = Slots(handle)
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._max_count = max_count
        self._length = length
        self._volume_name = volume_name
        self._recorder = recorder
        self._replace_failed = replace_failed
        self._keep_misfits = keep_misfits
        self._again: deque[QueuedVolume] = deque()
        self._current: EpochUnderWay | None = None
        self._upcoming: EpochUnderWay | None = None
        self._in_flight: dict[int, QueuedVolume] = {}
        self._numbers = 0
        self._waiting: dict[int, dict[str, KeySpec]] = {}
        self._in_memory: dict[int, PreparedVolume] = {}
        self._prepared: dict[Ticket, PreparedVolume] = {}
        self._failed: list[QueuedVolume] = []
        self._ready = 0

    def offer(self, ticket: Ticket, volume: PreparedVolume) -> None:
        """Take a volume that has been prepared already, to find out what patches look like."""
        self._prepared[ticket] = volume

    @property
    def info(self) -> SlabInfo | None:
        """The slab, once it is laid out."""
        return self._slots.info

    @property
    def replaced(self) -> dict[int, int]:
        """Replacements tried for volumes of the epoch under way, by entry."""
        return dict(self._current.replaced) if self._current else {}

    @property
    def has_failures(self) -> bool:
        """Whether any volume has failed that was not replaced."""
        return bool(self._failed)

    def open(
        self,
        plan: Plan,
        following: Plan | None,
        batches: int = 0,
        replaced: Mapping[int, int] | None = None,
    ) -> None:
        """Begin an epoch, after ``batches`` batches (and replacements) of an earlier run.

        What is prepared already, of this epoch and the following one, is kept where it still occurs.
        """
        guessed = self._upcoming
        # A volume that failed ahead of its epoch is tried again in it.
        failed_ahead = any(volume.ticket.epoch == plan.epoch for volume in self._failed)
        as_guessed = (
            guessed is not None and guessed.is_for(plan, self.queue_length) and not batches and not failed_ahead
        )
        kept: dict[Ticket, QueuedVolume] = {}
        for epoch in (self._current, None if as_guessed else guessed):
            for volume in epoch.volumes.values() if epoch else ():
                kept[volume.ticket] = volume
        if as_guessed and guessed is not None:
            self._current = guessed
        else:
            self._current = self._new_epoch(plan, batches)
            self._current.replaced.update(replaced or {})
            self._adopt(self._current, kept, 0)
        self._upcoming = self._new_epoch(following, 0) if following else None
        if self._upcoming is not None:
            self._adopt(self._upcoming, kept, sum(ticket.count for ticket in self._current.plan))
        for volume in kept.values():
            self._drop(volume)
        self._failed = [volume for volume in self._failed if not volume.dropped]
        self._again = deque(volume for volume in self._again if not volume.dropped)

    def expect(self, following: Plan) -> None:
        """Say which epoch will probably follow the one under way, where that was not known when it was opened."""
        if self._upcoming is None:
            self._upcoming = self._new_epoch(following, 0)

    def _new_epoch(self, plan: Plan, batches: int) -> EpochUnderWay:
        epoch = EpochUnderWay.after(plan, batches, self._batch_size)
        if self.info is not None:
            epoch.start_draws(self.queue_length, self._batch_size)
        return epoch

    def _adopt(self, epoch: EpochUnderWay, kept: dict[Ticket, QueuedVolume], before: int) -> None:
        """Keep prepared volumes that could be there if all before them were, so that those still find slots."""
        for entry, ticket in enumerate(epoch.plan if kept else ()):
            before += ticket.count
            volume = kept.get(ticket)
            if volume is None or not volume.untouched or not epoch.needs(entry):
                continue
            if self.info is None or before <= self._slots.number:
                epoch.add(entry, kept.pop(ticket))
                self._keep_only(volume, epoch.patches_of(entry))

    def _keep_only(self, volume: QueuedVolume, patches: set[int]) -> None:
        if volume.record is not None:
            self._ready += len(patches) - len(volume.left)
        volume.left = patches
        if volume.number not in self._in_flight:
            self._release(volume)

    def _drop(self, volume: QueuedVolume) -> None:
        volume.dropped = True
        self._keep_only(volume, set())

    def _release(self, volume: QueuedVolume) -> None:
        """Free the slots of a volume's patches that nobody will draw (any more)."""
        for patch in range(len(volume.slots or ())):
            if patch not in volume.left:
                self._slots.give_back(volume, patch)

    def fill(self, limit: int | None = None) -> None:
        """Hand out volumes in stream order as long as there is somebody to take them and room for their patches."""
        taken = 0
        while self._producer.capacity() > 0 and (limit is None or taken < limit):
            if self._again:
                volume = self._again.popleft()
                if volume.dropped:
                    continue
                if self.info is not None and volume.slots is None:
                    volume.slots = self._slots.take(volume.ticket.count)
                self._in_flight[volume.number] = volume
                self._submit(volume)
                taken += 1
                continue
            if self.info is None and len(self._in_flight) >= self._producer.num_workers:
                return
            epoch, entry = self._next()
            if epoch is None or entry is None:
                return
            ticket = epoch.plan.ticket(entry)
            if ticket is None:
                return
            slots = None
            if self.info is not None:
                if self._slots.free < ticket.count:
                    return
                slots = self._slots.take(ticket.count)
            self._numbers += 1
            source = epoch.source(entry, ticket)
            volume = QueuedVolume(entry, ticket, self._numbers, epoch.patches_of(entry), source, slots)
            epoch.add(entry, volume)
            self._in_flight[volume.number] = volume
            self._submit(volume)
            taken += 1

    def _submit(self, volume: QueuedVolume) -> None:
        prepared = self._prepared.pop(volume.source, None)
        if prepared is None:
            self._producer.submit(Assignment(volume.number, volume.source, volume.slots))
        else:
            self.handle(InMemory(volume.number, prepared))

    def _next(self) -> tuple[EpochUnderWay | None, int | None]:
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
            self._fail(volume, event.failure, event.worker)
            self._lay_out()

    def _fail(self, volume: QueuedVolume, failure: Failure, worker: str) -> None:
        if volume.dropped:
            self._release(volume)
            return
        self._recorder.failed(volume.source.volume)
        if self._replace_failed:
            epoch = next(e for e in (self._current, self._upcoming) if e and e.volumes.get(volume.entry) is volume)
            source = epoch.replacement(volume)
            if source is not None:
                name = self._volume_name(volume.source.volume)
                other, kind = self._volume_name(source.volume), failure.kind.__name__
                logger.warning("%s failed and is replaced by %s: %s: %s", name, other, kind, failure.message)
                self._numbers += 1
                volume.number, volume.source = self._numbers, source
                self._again.append(volume)
                return
            failure = replace(failure, message=f"{failure.message} No volume is left to replace it: all have failed.")
        volume.failed = failure, worker
        self._keep_only(volume, set())
        self._failed.append(volume)

    def _landed(self, volume: QueuedVolume, record: VolumeRecord) -> None:
        del self._in_flight[volume.number]
        volume.record = record
        self._ready += len(volume.left)
        self._release(volume)
        if volume.dropped:
            return
        self._recorder.prepared(record.seconds, record.transforms)
        epoch = self._current
        if epoch is not None and epoch.draws is not None and epoch.volumes.get(volume.entry) is volume:
            self._leave(epoch, epoch.draws.landed(volume.entry))

    def _lay_out(self) -> None:
        """Lay the slab out once the first volume in stream order is prepared, and give waiting volumes their slots."""
        if self.info is None:
            submitted = (*self._in_flight.values(), *self._again)
            unsettled = [volume for volume in submitted if not volume.dropped] or list(self._in_flight.values())
            if not unsettled:
                return
            # Also where it is tried again with another volume: who comes first does not depend on time.
            first = min(unsettled, key=lambda volume: (volume.ticket.epoch, volume.entry)).number
            if first in self._in_memory:
                specs = slab_specs(self._in_memory[first].patches[0])
            elif first in self._waiting:
                specs = self._waiting[first]
            else:
                return
            self._allocate(specs, self._volume_name(self._in_flight[first].source.volume))
        for number in list(self._waiting):
            del self._waiting[number]
            slots = self._in_flight[number].slots
            self._producer.grant(number, slots or [])
        while self._in_memory:  # a volume that does not fit fails, which leads here again
            number = next(iter(self._in_memory))
            self._write(self._in_flight[number], self._in_memory.pop(number))

    def _allocate(self, keys: Mapping[str, KeySpec], first: str) -> None:
        layout = SlabLayout(1, keys)
        self.queue_length = self._length(layout.patch_nbytes)
        slots = slots_needed(self.queue_length, self._producer.num_workers, self._max_count, self._batch_size)
        info = self._slots.lay_out(layout, slots, first)
        for _, volume in sorted(self._in_flight.items()):
            volume.slots = self._slots.take(volume.ticket.count)
        for epoch in (self._current, self._upcoming):
            if epoch is not None:
                epoch.start_draws(self.queue_length, self._batch_size)
        self._producer.announce(info)

    def _write(self, volume: QueuedVolume, prepared: PreparedVolume) -> None:
        try:
            record = self._slots.write(volume, prepared, self._keep_misfits)
        except Exception as error:
            self.handle(Failed(volume.number, Failure.of(error), "in the calling process"))
        else:
            self._landed(volume, record)

    def next_batch(self) -> list[DrawnPatch] | None:
        """The patches of the next batch, once all of them are there; ``None`` before that.

        An empty list means that the epoch is over.

        Raises:
            VolumeFailedError: a volume of this epoch could not be prepared.
        """
        epoch = self._current
        if epoch is None:
            return []
        if self._failed:
            self._raise_failure(epoch)
        if epoch.plan.empty:
            return []
        patches = epoch.next_patches(self._batch_size, self._batch_size if self._drop_last else 1)
        if patches == []:
            self._finish(epoch)
        return patches

    def drawn(self, patches: list[DrawnPatch]) -> None:
        """The batch has been copied out of its slots, which are free for other patches now."""
        epoch = self._current
        if epoch is None or epoch.draws is None:
            return
        epoch.pending = []
        epoch.batches += 1
        self._leave(epoch, [(patch.draw.entry, patch.draw.patch) for patch in patches if patch.draw.last])
        self._leave(epoch, epoch.draws.leaving())

    def _leave(self, epoch: EpochUnderWay, patches: Iterable[tuple[int, int]]) -> None:
        for entry, patch in patches:
            volume = epoch.volumes[entry]
            if patch not in volume.left:
                continue
            volume.left.discard(patch)
            self._ready -= 1
            self._slots.give_back(volume, patch)
            if volume.loose is not None:
                volume.loose[patch] = {}
            if not volume.left:
                del epoch.volumes[entry]

    @property
    def drawing(self) -> Drawing | None:
        """The draws of the epoch under way, once the slab is laid out."""
        return self._current.draws if self._current else None

    @property
    def ready_patches(self) -> int:
        """Patches that lie in their slots and are still to be drawn, the following epoch's included."""
        return self._ready

    def _finish(self, epoch: EpochUnderWay) -> None:
        """Drop what an epoch has left (a batch that was too small, or draws beyond its length)."""
        for volume in epoch.volumes.values():
            self._drop(volume)
        epoch.volumes = {}
        epoch.over = True

    def _raise_failure(self, epoch: EpochUnderWay) -> None:
        """Raise what the first of the epoch's failed volumes has failed with, once those before it are there."""
        submitted = (*self._failed, *self._in_flight.values(), *self._again)
        unsettled = [volume for volume in submitted if epoch.volumes.get(volume.entry) is volume]
        first = min(unsettled, key=lambda volume: volume.entry, default=None)
        if first is not None and first.failed is not None:
            failure, worker = first.failed
            raise VolumeFailedError(failure.exception(self._volume_name(first.source.volume), worker))
