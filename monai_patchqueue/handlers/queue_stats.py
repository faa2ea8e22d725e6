# SPDX-License-Identifier: Apache-2.0
"""The queue's figures in an Ignite engine's metrics, where every logger looks for figures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import ignite.distributed as idist
from ignite.engine import Engine, Events

if TYPE_CHECKING:
    from monai_patchqueue.queue.stats import QueueStats

__all__ = ["QueueStatsHandler"]


class HasStats(Protocol):
    """What the handler asks of a loader."""

    def stats(self) -> QueueStats:
        """The figures up to now."""
        ...


class QueueStatsHandler:
    """Put a loader's queue statistics into ``engine.state.metrics``, and log one line an epoch.

    Attached to a trainer, it makes the queue's figures show up wherever metrics do: MONAI's ``StatsHandler``,
    ``TensorBoardStatsHandler``, ``MLFlowHandler`` and ``MetricLogger``, Ignite's ``ProgressBar`` and loggers. It reads
    ``loader.stats()`` and nothing else, and works with any engine. Ignite clears metrics neither between epochs nor
    between runs; each figure stays until the next iteration overwrites it.

    Each metric's name is ``name``, an underscore and one of these (``queue_length`` gets no second ``queue_``):

    ===========================  =========  ================================================================
    figure                       unit       meaning
    ===========================  =========  ================================================================
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
    ===========================  =========  ================================================================

    All count from the loader's first batch on, over all epochs.
    ``starved`` is the one to look at first: near 0, the engine never waits and more workers gain nothing; near 1, it
    does little but wait.

    Args:
        loader: a ``PatchQueueLoader``, or anything else whose ``stats()`` returns
            :class:`~monai_patchqueue.queue.stats.QueueStats`.
        name: what the figures' names and the log lines begin with; where an engine has several loaders, one each.
        figures: which of the figures above to put into the metrics. ``None``: all.
        epoch_log: log a line at the end of each epoch, at level ``INFO``.

    Example:
        In a bundle, as the first of the training handlers, since the configs for several GPUs count from the end::

            {"_target_": "monai_patchqueue.QueueStatsHandler", "loader": "@train#dataloader"}

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
        self, loader: HasStats, name: str = "queue", figures: Sequence[str] | None = None, epoch_log: bool = True
    ) -> None:
        if not callable(getattr(loader, "stats", None)):
            raise TypeError(
                f"QueueStatsHandler needs a loader with a stats() method, such as PatchQueueLoader, "
                f"got {type(loader).__name__}."
            )
        if isinstance(figures, str):
            raise TypeError(f"figures: expected a sequence of names, got the string {figures!r}.")
        self.loader = loader
        self.name = name
        self.figures = None if figures is None else tuple(figures)
        self.epoch_log = epoch_log
        self.logger = logging.getLogger(__name__)

    def attach(self, engine: Engine) -> None:
        """Register the handler; attaching it twice to an engine is the same as once.

        Args:
            engine: the engine that draws from the loader, as a rule a trainer.
        """
        if not engine.has_event_handler(self.update_metrics, Events.ITERATION_COMPLETED):
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.update_metrics)
        if not engine.has_event_handler(self.epoch_completed, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def update_metrics(self, engine: Engine) -> None:
        """Put the figures into ``engine.state.metrics``.

        Args:
            engine: the engine.
        """
        self._put(engine, self.loader.stats())

    def epoch_completed(self, engine: Engine) -> None:
        """Bring the metrics up to date and log a line.

        Args:
            engine: the engine.
        """
        stats = self.loader.stats()
        self._put(engine, stats)
        if self.epoch_log and self.logger.isEnabledFor(logging.INFO):
            self.logger.info("%s%s", self._label(), stats)

    def _put(self, engine: Engine, stats: QueueStats) -> None:
        scalars = stats.scalars()
        figures = scalars if self.figures is None else self.figures
        try:
            engine.state.metrics.update({self._metric(figure): scalars[figure] for figure in figures})
        except KeyError as error:
            raise ValueError(f"figures: {error} is none of {', '.join(scalars)}.") from None

    def _metric(self, figure: str) -> str:
        prefix = f"{self.name}_"
        return figure if figure.startswith(prefix) else prefix + figure  # no queue_queue_length

    def _label(self) -> str:
        # Every rank has a queue of its own, and any of them can be the one that the others wait for.
        rank = f" of rank {idist.get_rank()}" if idist.get_world_size() > 1 else ""
        return f"{self.name}{rank}: "
