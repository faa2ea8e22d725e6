# SPDX-License-Identifier: Apache-2.0
"""The queue's figures in an Ignite engine's metrics, where every logger looks for figures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import ignite.distributed as idist
from ignite.engine import Engine, Events

from ..queue.combine import Continued, as_plain, combined, from_plain
from ..queue.stats import QueueStats
from ..report.effort import Effort
from ..report.patch_tally import PatchTally
from .machine import MachineMonitor
from .ranks import RankExchange

__all__ = ["BOTTLENECKS", "FIGURES", "HasStats", "QueueStatsHandler"]

# The stages that ``queue_bottleneck`` names by number.
BOTTLENECKS = ("unknown", "consumer", "workers", "assembly", "item_transform", "batch_transform", "queue")

FIGURES = (
    *QueueStats().scalars(),
    "bottleneck",
    "foreground_share",
    "last_foreground_share",
    "centers_<class>",
    "memory_bytes",
    "gpu_utilization",
    "gpu_memory_bytes",
    "gpu_allocated_bytes",
)


class HasStats(Protocol):
    """What the handler asks of a loader."""

    def stats(self) -> QueueStats:
        """The figures up to now."""
        ...


class QueueStatsHandler:
    """Put a loader's queue statistics into ``engine.state.metrics``, and log one line an epoch.

    Attached to a trainer, it makes the queue's figures show up wherever metrics do: MONAI's ``StatsHandler``,
    ``TensorBoardStatsHandler``, ``MLFlowHandler`` and ``MetricLogger``, Ignite's ``ProgressBar`` and loggers. It reads
    ``loader.stats()`` and the trainer's batches, and works with any engine. Ignite clears metrics neither between
    epochs nor between runs; each figure stays until the next iteration overwrites it.

    Each metric's name is ``name``, an underscore and one of these (``queue_length`` gets no second ``queue_``):

    ===========================  =========  =====================================================================
    figure                       unit       meaning
    ===========================  =========  =====================================================================
    ``epoch``                    –          the queue's epoch, from 0
    ``batches``                  batches    handed out
    ``patches``                  patches    handed out
    ``volumes``                  volumes    prepared
    ``fill``                     share      patches that are ready, of ``queue_length``
    ``queue_length``             patches    size of the window
    ``patches_per_second``       patches/s  handed out
    ``volumes_per_second``       volumes/s  prepared
    ``volumes_per_batch``        volumes    that meet in a batch, on average
    ``reuse``                    draws      of a patch, on average
    ``age``                      batches    that what is drawn has been in a random queue, on average
    ``seconds``                  s          of epochs under way, which rates and shares refer to
    ``wait_seconds``             s          waited for a batch, on average
    ``last_wait_seconds``        s          waited for the last batch
    ``max_wait_seconds``         s          waited for the slowest batch
    ``first_wait_seconds``       s          waited for the very first batch
    ``epoch_wait_seconds``       s          waited for the first batch of each later epoch, on average
    ``starved``                  share      of the time, spent waiting for batches
    ``load_seconds``             s          per volume, in the worker: loading and transforms
    ``sample_seconds``           s          per volume, in the worker: choosing and cutting patches
    ``write_seconds``            s          per volume, in the worker: writing patches into their slots
    ``cpu_seconds``              s          per volume, in the worker: processor time of all this
    ``max_volume_seconds``       s          in the worker, for the slowest volume
    ``assemble_seconds``         s          per batch: gathering patches and collating them
    ``item_transform_seconds``   s          per batch: ``item_transform``
    ``batch_transform_seconds``  s          per batch: ``batch_transform``
    ``step_seconds``             s          per batch: the engine's own work until it asks for the next one
    ``consumer_cpu_seconds``     s          per batch: processor time of the engine's process, workers apart
    ``worker_busy``              share      of the workers' time, spent preparing volumes
    ``assembly_busy``            share      of the time, spent assembling batches
    ``num_workers``              –          volumes prepared at the same time; 0: the engine's thread does it
    ``slab_bytes``               bytes      of memory that hold the patches
    ``failures``                 volumes    could not be prepared and were replaced
    ``lost_draws``               draws      left out, so that all ranks make the same number of steps
    ``extra_draws``              draws      made again, for the same reason
    ``volumes_seen``             volumes    patches were handed out of
    ``volume_patches_min``       patches    handed out of the volume that gave fewest
    ``volume_patches_max``       patches    handed out of the volume that gave most
    ``bottleneck``               –          what keeps batches from coming faster: 0 unknown, 1 consumer, 2 workers, 3
                                            assembly, 4 item_transform, 5 batch_transform, 6 queue
    ``foreground_share``         share      of patches, that have any foreground (with ``label_key``)
    ``last_foreground_share``    share      of the last batch's patches, likewise
    ``centers_<class>``          patches    with a voxel of that class at their center (with ``label_key``)
    ``memory_bytes``             bytes      of memory, resident, of this process and its workers
    ``gpu_utilization``          share      of the last moments, in which the GPU was computing (with the extra ``gpu``)
    ``gpu_memory_bytes``         bytes      of the GPU's memory that are taken, by anyone
    ``gpu_allocated_bytes``      bytes      that tensors of this process took on the GPU at most
    ===========================  =========  =====================================================================

    All count from the loader's first batch on, over all epochs, and over the runs before where the handler is part of a
    checkpoint. ``starved`` is the one to look at first: near 0, the engine never waits and more workers gain nothing;
    near 1, it does little but wait. Figures of the GPU are there where CUDA is.

    In a distributed run each rank has figures of its own queue, as any of them can be the one that the others wait for.
    At the end of an epoch, those of all ranks that have the handler are put together under ``queue_all_<figure>``:
    counts, rates and bytes are sums, shares and times are means (``max_wait_seconds``: the longest). They are passed on
    through the process group's store; no rank waits long for another. Out of a checkpoint that one rank wrote for all,
    each goes on from that rank's figures.

    Args:
        loader: a ``PatchQueueLoader``, or anything else whose ``stats()`` returns
            :class:`~monai_patchqueue.queue.stats.QueueStats`.
        name: what the figures' names and the log lines begin with; where an engine has several loaders, one each.
        figures: which of the figures above to put into the metrics. ``None``: all.
        epoch_log: log a line at the end of each epoch, at level ``INFO``.
        label_key: where batches have the label map, to count classes at the patches' centers and patches with
            foreground. ``None``: they are not counted.
        effort: share of the time that looking at labels may take, 0 to 1; where it would take more, as it can where
            steps are short, some batches are passed over, so that the figures of labels are those of the others. 1: all
            are looked at.

    Raises:
        TypeError: a loader without ``stats()``, or ``figures`` that are one string.
        ValueError: a figure that there is not, or an effort that is no share.

    Example:
        In a bundle, as the first of the training handlers, since the configs for several GPUs count from the end::

            {"_target_": "monai_patchqueue.QueueStatsHandler", "loader": "@train#dataloader", "label_key": "label"}

        In Python:

        >>> import torch
        >>> from ignite.engine import Engine
        >>> from monai_patchqueue import PatchQueueLoader, QueueStatsHandler
        >>> volumes = [[{"image": torch.zeros(1, 8, 8)} for _ in range(4)] for _ in range(3)]
        >>> loader = PatchQueueLoader(volumes, batch_size=2, batch_unit="patch", samples_per_volume=4)
        >>> trainer = Engine(lambda engine, batch: None)
        >>> QueueStatsHandler(loader).attach(trainer)
        >>> trainer.run(loader).metrics["queue_patches"]
        12.0
    """

    def __init__(
        self,
        loader: HasStats,
        name: str = "queue",
        figures: Sequence[str] | None = None,
        epoch_log: bool = True,
        label_key: str | None = None,
        effort: float = 0.002,
    ) -> None:
        if not callable(getattr(loader, "stats", None)):
            raise TypeError(
                f"QueueStatsHandler needs a loader with a stats() method, such as PatchQueueLoader, "
                f"got {type(loader).__name__}."
            )
        if isinstance(figures, str):
            raise TypeError(f"figures: expected a sequence of names, got the string {figures!r}.")
        for figure in figures or ():
            if figure not in FIGURES and not figure.startswith("centers_"):
                raise ValueError(f"figures: {figure!r} is none of {', '.join(FIGURES)}.")
        self.loader = loader
        self.name = name
        self.figures = None if figures is None else tuple(figures)
        self.epoch_log = epoch_log
        self.label_key = label_key
        self.logger = logging.getLogger(__name__)
        self.tally = None if label_key is None else PatchTally(label_key)
        self._effort = Effort(effort)
        self._continued = Continued()
        self._machine = MachineMonitor()
        self._ranks = RankExchange(name)
        self._metrics = _MetricNames(name)

    def attach(self, engine: Engine) -> None:
        """Register the handler; attaching it twice to an engine is the same as once.

        Args:
            engine: the engine that draws from the loader, as a rule a trainer.
        """
        for event, handler in (
            (Events.STARTED, self.started),
            *([(Events.ITERATION_STARTED, self.look_at_batch)] if self.tally is not None else []),
            (Events.ITERATION_COMPLETED, self.update_metrics),
            (Events.EPOCH_COMPLETED, self.epoch_completed),
        ):
            if not engine.has_event_handler(handler, event):
                engine.add_event_handler(event, handler)

    def started(self, engine: Engine) -> None:
        """Find the GPU that the engine runs on, and the other ranks.

        Args:
            engine: the engine.
        """
        self._machine = MachineMonitor(getattr(engine.state, "device", None))
        self._ranks.join()

    def look_at_batch(self, engine: Engine) -> None:
        """Count the batch's patches, before anybody changes it.

        Args:
            engine: the engine.
        """
        if self.tally is not None:
            self._effort.spend(self.tally.add, engine.state.batch)

    def update_metrics(self, engine: Engine) -> None:
        """Put the figures into ``engine.state.metrics``.

        Args:
            engine: the engine.
        """
        self._put(engine, self._scalars(self.stats()))

    def epoch_completed(self, engine: Engine) -> None:
        """Bring the metrics up to date, put those of all ranks together, and log a line.

        Args:
            engine: the engine.
        """
        if self.tally is not None:
            self.tally.settle()
        stats = self.stats()
        self._put(engine, self._scalars(stats))
        everyone = self._of_all_ranks(stats)
        if everyone is not None:
            self._put(engine, everyone.scalars(), "all_")
        if self.epoch_log and self.logger.isEnabledFor(logging.INFO):
            self.logger.info("%s%s", self._label(), stats)

    def stats(self) -> QueueStats:
        """The loader's figures, together with those of runs before that were in a checkpoint."""
        return self._continued(self.loader.stats())

    def state_dict(self) -> dict[str, Any]:
        """The figures as plain values, for a checkpoint: some bytes per volume."""
        tally = None if self.tally is None else self.tally.state_dict()
        return {"stats": as_plain(self.stats()), "tally": tally}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from the figures of ``state``.

        Args:
            state: what ``state_dict()`` gave.
        """
        self._continued = Continued(from_plain(state["stats"]), self.loader.stats())
        if self.tally is not None and state["tally"] is not None:
            self.tally.load_state_dict(state["tally"])

    def _of_all_ranks(self, stats: QueueStats) -> QueueStats | None:
        note = as_plain(replace(stats, volume_expected={}, failure_counts={}))
        note["volume_counts"] = list(note["volume_counts"].items())  # JSON would make the keys strings
        notes = self._ranks.exchange(note)
        parts = [from_plain({**note, "volume_counts": dict(note["volume_counts"])}) for note in notes]
        return combined(parts, ranks=True) if parts else None

    def _scalars(self, stats: QueueStats) -> dict[str, float]:
        return {
            **stats.scalars(),
            "bottleneck": float(BOTTLENECKS.index(stats.bottleneck.split(":")[0])),
            **(self.tally.scalars() if self.tally else {}),
            **self._machine.scalars(),
        }

    def _put(self, engine: Engine, scalars: Mapping[str, float], prefix: str = "") -> None:
        if self.figures is not None:
            scalars = {figure: scalars[figure] for figure in self.figures if figure in scalars}
        figures = map(prefix.__add__, scalars) if prefix else scalars
        engine.state.metrics.update(zip(map(self._metrics.__getitem__, figures), scalars.values(), strict=True))

    def _label(self) -> str:
        rank = f" of rank {idist.get_rank()}" if idist.get_world_size() > 1 else ""
        return f"{self.name}{rank}: "


class _MetricNames(dict[str, str]):
    """Names of metrics by figure, made when they are first asked for."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._prefix = f"{name}_"

    def __missing__(self, figure: str) -> str:
        metric = figure if figure.startswith(self._prefix) else self._prefix + figure  # no queue_queue_length
        self[figure] = metric
        return metric
