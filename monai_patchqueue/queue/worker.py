# SPDX-License-Identifier: Apache-2.0
"""What every kind of worker does with a ticket: prepare the volume, then write its patches into their slots."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from monai.data import CacheDataset
from torch.utils.data import Dataset

from ..io.lazy_tensor import LazyTensor
from ..io.reused_memory import decompressed
from .freed_memory import keep_freed_memory
from .lent_items import lending
from .record import Patch, VolumeRecord, array_specs, as_tensor, first_difference, pack
from .schedule import PREPARE, Ticket, seed_sequence
from .seeding import Reseeder, global_random_state, reachable, seed_globals
from .slab import KeySpec, Slab, bits
from .thread_copies import copy_for_thread
from .timing import Stopwatch
from .traces import TraceNames, transform_ids
from .view_patches import giving_views, last_transform

__all__ = ["MisfitError", "PreparedVolume", "Preparer", "Recipe", "spread", "write"]

KEPT_VOLUMES = 2
"""Decompressed volumes, an image and its label say, whose memory a worker process keeps for the next ones."""


@dataclass(frozen=True)
class Recipe:
    """How volumes become patches: all that a worker needs to know.

    Args:
        dataset: map-style; an item is a dict (one patch) or a sequence of dicts.
        patch_transform: applied to each patch once.
        seed: the run's seed.
        worker_init_fn: called with the worker's number when it starts.
        traced: identities of the pipeline's transforms in the consumer's process, by which MONAI finds the transform
            that a trace is to be inverted with.
        keep_misfits: hand patches that do not fit their slots over in memory of their own.
    """

    dataset: Dataset[Any]
    seed: int
    patch_transform: Callable[[Any], Any] | None = None
    worker_init_fn: Callable[[int], object] | None = None
    traced: tuple[int, ...] = ()
    keep_misfits: bool = False

    def for_thread(self) -> Recipe:
        """The recipe for a thread of its own: transforms and random state are copied, data and caches are shared."""
        dataset, patch_transform = copy_for_thread(self.dataset, self.patch_transform)
        return replace(self, dataset=dataset, patch_transform=patch_transform)

    def with_traced(self) -> Recipe:
        """The recipe as the consumer hands it out."""
        return replace(self, traced=transform_ids(self.dataset, self.patch_transform))


class MisfitError(ValueError):
    """A patch has another shape or dtype, or other keys, than the slots were made for."""


@dataclass
class PreparedVolume:
    """A volume's patches, in the memory of whoever prepared them, and the time that this took."""

    patches: list[Patch]
    seconds: dict[str, float] = field(default_factory=dict)
    transforms: dict[str, float] = field(default_factory=dict)


class Preparer:
    """Prepares volumes with one intra-op thread and with random state that depends on the ticket alone.

    Args:
        recipe: what to do.
        where: ``"process"`` (a process of our own), ``"thread"`` (a thread, with a copy of the recipe of its own) or
            ``"inline"`` (the caller's thread and objects, left as they were).
        written: whether all patches are copied into their slots next, by :func:`write`: then they may share memory with
            their volumes.
    """

    def __init__(self, recipe: Recipe, where: Literal["process", "thread", "inline"], *, written: bool = False) -> None:
        self._recipe = recipe
        self._where = where
        # A process of our own does nothing else, whichever threads a transform has.
        self._cpu_time = time.process_time if where == "process" else time.thread_time
        self._reseed = Reseeder(recipe.dataset, recipe.patch_transform)
        self._stopwatch = Stopwatch(recipe.dataset)
        self._caches = [obj for obj in reachable(recipe.dataset) if isinstance(obj, CacheDataset)]
        written = written and recipe.patch_transform is None and not recipe.keep_misfits
        self._last = last_transform(recipe.dataset) if written else None
        ids = transform_ids(recipe.dataset, recipe.patch_transform)
        self._trace_names = TraceNames(ids, recipe.traced)
        if where == "process":
            torch.set_num_threads(1)
            keep_freed_memory()
            decompressed.keep(KEPT_VOLUMES)

    def __call__(self, ticket: Ticket) -> PreparedVolume:
        """Prepare one volume.

        Raises:
            TypeError: an item that is neither a dict nor a sequence of dicts.
            ValueError: another number of patches than the ticket says.
        """
        sequence = seed_sequence(self._recipe.seed, PREPARE, ticket.epoch, ticket.volume, ticket.occurrence)
        self._reseed(sequence)
        with self._surroundings(sequence.spawn(1)[0]), lending(self._caches, self._last), giving_views(self._last):
            start, cpu = time.perf_counter(), self._cpu_time()
            with self._stopwatch.running() as spent:
                item = self._recipe.dataset[ticket.volume]
            patches = _patches(item, ticket.count)
            if self._recipe.patch_transform is not None:
                loaded = time.perf_counter()
                patches = [self._recipe.patch_transform(patch) for patch in patches]
                spent.transforms["patch_transform"] = time.perf_counter() - loaded
            self._trace_names.rename(patches)
            seconds, cpu = time.perf_counter() - start, self._cpu_time() - cpu
        stages = {"load": seconds - spent.sampling, "sample": spent.sampling, "cpu": cpu}
        return PreparedVolume(patches, stages, spent.transforms)

    @contextmanager
    def _surroundings(self, sequence: Any) -> Iterator[None]:
        if self._where == "process":
            seed_globals(sequence)
            yield
        elif self._where == "thread":
            yield
        else:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                with global_random_state(sequence):
                    yield
            finally:
                torch.set_num_threads(threads)


def _patches(item: Any, count: int) -> list[Patch]:
    patches = [item] if isinstance(item, Mapping) else item
    if not isinstance(patches, Sequence) or isinstance(patches, (str, bytes)):
        raise TypeError(f"expected the dataset to give a dict or a list of dicts, found {type(item).__name__}.")
    for patch in patches:
        if not isinstance(patch, Mapping):
            hint = " Two transforms in sequence that each give several samples do this: keep one of them."
            nested = isinstance(patch, (list, tuple))
            raise TypeError(
                "expected a list of dicts, one per patch, found a list of "
                f"{type(patch).__name__}.{hint if nested else ''}"
            )
    if len(patches) != count:
        raise ValueError(
            f"gave {len(patches)} patches, but {count} were announced. Counts must be known before an epoch: pass "
            f"samples_per_volume (a number, the name of an item's key, or a callable(item) -> int)."
        )
    return list(patches)


def write(volume: PreparedVolume, slab: Slab, slots: Sequence[int], first: str) -> VolumeRecord:
    """Copy a volume's patches into their slots; what doesn't go there is returned.

    Args:
        volume: the patches.
        slab: where to.
        slots: a slot per patch, as :func:`spread` gives them.
        first: name of the volume that decided the slab's layout, for messages.

    Raises:
        MisfitError: a patch that does not fit its slot.
        ValueError: patches of different keys.
    """
    start, cpu = time.perf_counter(), time.thread_time()
    keys = slab.layout.keys
    patches = spread(volume.patches, len(slots))
    narrow: dict[str, list[np.dtype[Any] | None]] = {key: [] for key in keys}
    with torch._C.DisableTorchFunctionSubclass():  # MetaTensor's, by which each look at a shape takes long
        for number, (patch, slot) in enumerate(zip(patches, slots, strict=True)):
            _check(patch, number, keys, patches[0], first)
            for key in keys:
                narrow[key].append(_write_patch(patch[key], slab, key, slot))
    record = pack(patches, keys)
    record.narrow = {key: dtypes for key, dtypes in narrow.items() if any(dtypes)}
    computing = volume.seconds.get("cpu", 0.0) + time.thread_time() - cpu
    record.seconds = {**volume.seconds, "write": time.perf_counter() - start, "cpu": computing}
    record.transforms = volume.transforms
    return record


def _write_patch(value: Any, slab: Slab, key: str, slot: int) -> np.dtype[Any] | None:
    """Copy an array into its slot, or read it into there; its dtype there, if it is not the slab's."""
    part = value.unread() if isinstance(value, LazyTensor) else None
    if part is None:
        np.copyto(slab.arrays[key][slot], bits(as_tensor(value)))
        return None
    # Cast when the batch is gathered: until then it takes less memory, and less time to copy.
    dtype = part.narrow_dtype()
    part.into(slab.tensors[key][slot].numpy() if dtype is None else slab.narrow(key, dtype)[slot])
    return dtype


def spread(patches: Sequence[Patch], number: int) -> list[Patch]:
    """``number`` patches: where a volume takes the place of one that failed, its own are repeated or left out."""
    return [patches[index % len(patches)] for index in range(number)]


def _check(patch: Patch, number: int, keys: Mapping[str, KeySpec], first_patch: Patch, first: str) -> None:
    if patch.keys() != first_patch.keys():
        odd = sorted(map(str, patch.keys() ^ first_patch.keys()))
        raise ValueError(
            f"patches 0 and {number} differ in their keys {odd}: every patch of a volume needs the same keys."
        )
    difference = first_difference(keys, array_specs(patch, always=keys))
    if difference:
        raise MisfitError(
            f"patch {number} does not fit the patches of {first}, which was prepared first: {difference}. Patches "
            "of all "
            "volumes need the same keys, shapes and dtypes: add SpatialPadd or ResizeWithPadOrCropd for shapes, "
            "CastToTyped or EnsureTyped for dtypes and MetaTensors, DeleteItemsd for keys."
        )
