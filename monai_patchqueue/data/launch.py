# SPDX-License-Identifier: Apache-2.0
"""From a queue's arguments to workers, slab and queue that run."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from monai.data import list_data_collate

from ..queue.assemble import Assembler
from ..queue.epoch import DrawnPatch
from ..queue.errors import Failure
from ..queue.patch_queue import PatchQueue
from ..queue.producers import ExecutorProducer, InlineProducer, ProcessProducer, Producer, ThreadProducer
from ..queue.recorder import Recorder
from ..queue.runner import BackgroundRunner, InlineRunner, Runner
from ..queue.schedule import Plan, Ticket
from ..queue.slab import SlabHandle
from ..queue.worker import PreparedVolume, Preparer, Recipe
from .collate import WarnsOnce, collate_patches
from .options import QueueOptions
from .sizing import Sizing
from .volumes import volume_name

__all__ = ["launch", "prepare_first"]


def launch(
    owner: object,
    options: QueueOptions,
    sizing: Sizing,
    *,
    seed: int,
    recorder: Recorder,
    prepared: tuple[Ticket, PreparedVolume] | None = None,
    keep_misfits: bool = False,
    annotate: Callable[[Sequence[DrawnPatch]], dict[str, torch.Tensor]] | None = None,
) -> tuple[Runner, weakref.finalize[..., Any]]:
    """Start the workers, and a queue that waits for its first epoch.

    Args:
        owner: all ends when it is gone.
        options: the arguments.
        sizing: the lengths that follow from them.
        seed: of all randomness.
        recorder: where statistics are kept.
        prepared: a volume that has been prepared already.
        keep_misfits: take patches of different shapes.
        annotate: gives more keys for a batch.

    Returns:
        What runs the queue, and what is called to end it.
    """
    recipe = Recipe(options.dataset, seed, options.patch_transform, options.worker_init_fn, keep_misfits=keep_misfits)
    in_processes = options.executor is None and options.num_workers > 0 and options.worker_type == "process"
    handle = SlabHandle(shared=in_processes)
    producer = _producer(options, recipe.with_traced(), handle)
    names = partial(volume_name, options.dataset)
    queue = PatchQueue(
        producer,
        handle,
        batch_size=options.batch_size,
        drop_last=options.drop_last,
        max_count=sizing.max_count,
        length=sizing.queue_length,
        volume_name=names,
        recorder=recorder,
        replace_failed=options.on_error == "replace",
        keep_misfits=keep_misfits,
    )
    if prepared is not None:
        queue.offer(*prepared)
    # What collates arrays just as the queue gathers them need not do so again.
    own = options.collate_fn is collate_patches
    assembler = Assembler(
        seed,
        item_transform=options.item_transform,
        batch_transform=options.batch_transform,
        collate_fn=None if own else options.collate_fn,
        standard=WarnsOnce() if own else list_data_collate,
        annotate=annotate,
        pin_memory=options.pin_memory,
        device=options.device,
        volume_name=names,
        recorder=recorder,
    )
    kind = InlineRunner if isinstance(producer, InlineProducer) else BackgroundRunner
    runner = kind(queue, producer, assembler)
    return runner, weakref.finalize(owner, _close, runner, handle, os.getpid())


def _producer(options: QueueOptions, recipe: Recipe, handle: SlabHandle) -> Producer:
    if options.executor is not None:
        return ExecutorProducer(recipe, options.executor)
    if options.num_workers == 0:
        return InlineProducer(recipe)
    if options.worker_type == "thread":
        return ThreadProducer(recipe, options.num_workers, options.volume_timeout)
    if options.context is None:
        raise RuntimeError("process workers need a multiprocessing context.")
    return ProcessProducer(recipe, options.num_workers, options.context, handle, options.volume_timeout)


def prepare_first(options: QueueOptions, seed: int, plan: Plan) -> tuple[Ticket, PreparedVolume]:
    """Prepare the first volume of a plan, to find out what its patches look like."""
    preparer = Preparer(Recipe(options.dataset, seed, options.patch_transform), "inline")
    entry, ticket = next((entry, ticket) for entry, ticket in enumerate(plan) if ticket.count)
    attempt = 0
    while True:
        try:
            return ticket, preparer(ticket)
        except Exception as error:
            other = plan.replacement(entry, attempt) if options.on_error == "replace" else None
            if other is None:
                name = volume_name(options.dataset, ticket.volume)
                raise Failure.of(error).exception(name, "in the calling process") from error
            ticket, attempt = other, attempt + 1


def _close(runner: Runner, handle: SlabHandle, pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked child's copy: threads, workers and the slab are its parent's
    runner.close()
    handle.close()
