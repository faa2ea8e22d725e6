# SPDX-License-Identifier: Apache-2.0
"""Places for patches in the slab: which of them are free, and whose the others are."""

from __future__ import annotations

from dataclasses import replace

from ..io.copies import own_copy
from .epoch import QueuedVolume
from .record import VolumeRecord
from .slab import Slab, SlabHandle, SlabInfo, SlabLayout
from .worker import MisfitError, PreparedVolume, spread, write

__all__ = ["Slots"]


class Slots:
    """The slab's slots, from when it is known what patches look like.

    Args:
        handle: memory for the slab.
    """

    def __init__(self, handle: SlabHandle) -> None:
        self.info: SlabInfo | None = None
        self._handle = handle
        self._free: list[int] = []

    @property
    def number(self) -> int:
        """How many there are; none before the slab is laid out."""
        return self.info.slab.layout.slots if self.info else 0

    @property
    def free(self) -> int:
        """How many there are to take."""
        return len(self._free)

    def lay_out(self, layout: SlabLayout, number: int, first: str) -> SlabInfo:
        """Make the slab: ``number`` slots for patches as those of the volume named ``first``."""
        self.info = SlabInfo(Slab(self._handle, replace(layout, slots=number)), first)
        self._free = list(range(number))[::-1]
        return self.info

    def take(self, count: int) -> list[int]:
        """Slots for so many patches, as many as are ``free`` at most."""
        return [self._free.pop() for _ in range(count)]

    def give_back(self, volume: QueuedVolume, patch: int) -> None:
        """Free the slot of a patch that nobody will draw (any more)."""
        if volume.slots is not None and volume.slots[patch] >= 0:
            self._free.append(volume.slots[patch])
            volume.slots[patch] = -1

    def write(self, volume: QueuedVolume, prepared: PreparedVolume, keep_misfits: bool) -> VolumeRecord:
        """Copy a volume's patches, which are in this process's memory, into its slots.

        With ``keep_misfits``, patches that do not fit are kept beside the slab.

        Raises:
            MisfitError: patches that do not fit their slots.
        """
        if self.info is None or volume.slots is None:
            raise RuntimeError("a volume is written before the slab is laid out.")
        try:
            return write(prepared, self.info.slab, volume.slots, self.info.first)
        except MisfitError:
            if not keep_misfits:
                raise
        volume.loose = [own_copy(patch) for patch in spread(prepared.patches, len(volume.slots))]
        keys = tuple(volume.loose[0])
        return VolumeRecord(keys, {}, [], {}, seconds=prepared.seconds, transforms=prepared.transforms)
