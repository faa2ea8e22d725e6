# SPDX-License-Identifier: Apache-2.0
"""A report of a training run's data: a page and pictures, at its end, on demand, and when it fails."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events

from ..queue.combine import Continued, as_plain, from_plain
from ..queue.stats import QueueStats
from ..report.run_record import RunRecord
from ..report.run_report import RunReport
from .machine import MachineMonitor
from .queue_stats import HasStats

__all__ = ["QueueReportHandler"]


class QueueReportHandler:
    """Write a report of how a trainer was fed: whether it waited, why, and what was sampled.

    The report is ``report.html`` in ``output_dir``, a page of one file, with its plots as pictures under ``report/``
    beside it: waits over time, what each stage could give, the patches of each volume against what the sampler asked
    for, classes at patches' centers, where patches were taken, the queue's fill, and memory. A verdict stands on top of
    it, and in the log. It is written when the run ends, is interrupted, or fails, and by :meth:`write`.

    What is gathered takes memory that does not grow with the run, and is part of a checkpoint where the handler is.
    Each rank of a distributed run writes a report of its own queue: ``report_rank_1.html`` and so on.

    Needs matplotlib (extra ``plot``).

    Args:
        loader: a ``PatchQueueLoader``, or anything else whose ``stats()`` returns
            :class:`~monai_patchqueue.queue.stats.QueueStats`.
        output_dir: folder of the report; it is made.
        image_key: where batches have the image, for the map of patches. ``None``: there is none.
        label_key: where batches have the label map, for classes at centers. ``None``: nothing is said of classes.
        name: what is reported on, as the report's title says it.
        interval: epochs from one report to the next while the run goes on; 0: none.
        class_names: what to call the classes of the label map, as ``dataset.json`` has it under ``labels``: by number,
            which may be a string.
        effort: share of the time that looking at batches may take, 0 to 1; where it would take more, some are passed
            over, so that classes and the map are those of the others.

    Raises:
        TypeError: a loader without ``stats()``.
        ValueError: an effort that is no share.

    Example:
        In a bundle, as the first of the training handlers, since the configs for several GPUs count from the end::

            {
                "_target_": "monai_patchqueue.QueueReportHandler",
                "loader": "@train#dataloader",
                "output_dir": "@output_dir",
                "label_key": "label"
            }

        In Python:

        >>> import tempfile, torch
        >>> from ignite.engine import Engine
        >>> from monai_patchqueue import PatchQueueLoader, QueueReportHandler
        >>> volumes = [[{"image": torch.zeros(1, 8, 8)} for _ in range(4)] for _ in range(3)]
        >>> loader = PatchQueueLoader(volumes, batch_size=2, batch_unit="patch", samples_per_volume=4)
        >>> trainer = Engine(lambda engine, batch: None)
        >>> report = QueueReportHandler(loader, tempfile.mkdtemp())
        >>> report.attach(trainer)
        >>> _ = trainer.run(loader)
        >>> report.path.name, report.path.exists()
        ('report.html', True)
    """

    def __init__(
        self,
        loader: HasStats,
        output_dir: str | os.PathLike[str],
        image_key: str | None = "image",
        label_key: str | None = None,
        name: str = "queue",
        interval: int = 0,
        class_names: Mapping[int | str, str] | None = None,
        effort: float = 0.005,
    ) -> None:
        if not callable(getattr(loader, "stats", None)):
            raise TypeError(
                f"QueueReportHandler needs a loader with a stats() method, such as PatchQueueLoader, "
                f"got {type(loader).__name__}."
            )
        self.loader = loader
        self.output_dir = Path(output_dir)
        self.image_key = image_key
        self.label_key = label_key
        self.name = name
        self.interval = interval
        self.class_names = {int(label): name for label, name in (class_names or {}).items()}
        self.record = RunRecord(image_key, label_key, effort)
        self.logger = logging.getLogger(__name__)
        self._continued = Continued()
        self._machine = MachineMonitor()

    def attach(self, engine: Engine) -> None:
        """Register the handler; attaching it twice to an engine is the same as once.

        Args:
            engine: the engine that draws from the loader, as a rule a trainer.
        """
        for event, handler in (
            (Events.STARTED, self.started),
            (Events.ITERATION_STARTED, self.look_at_batch),
            (Events.ITERATION_COMPLETED, self.note_step),
            (Events.EPOCH_COMPLETED, self.epoch_completed),
            (Events.COMPLETED, self.completed),
            (Events.INTERRUPT, self.interrupted),
            (Events.EXCEPTION_RAISED, self.failed),
        ):
            if not engine.has_event_handler(handler, event):
                engine.add_event_handler(event, handler)

    def started(self, engine: Engine) -> None:
        """Begin to gather.

        Args:
            engine: the engine.
        """
        self._machine = MachineMonitor(getattr(engine.state, "device", None))
        self.record.begin(self.stats())
        # After an event's handlers an engine takes an exception for dealt with; all others shall have had their say.
        if not engine.has_event_handler(self._raise, Events.EXCEPTION_RAISED):
            engine.add_event_handler(Events.EXCEPTION_RAISED, self._raise)

    def look_at_batch(self, engine: Engine) -> None:
        """Take note of a batch, before anybody changes it.

        Args:
            engine: the engine.
        """
        self.record.look_at(engine.state.batch)

    def note_step(self, engine: Engine) -> None:
        """Take note of a step that is over.

        Args:
            engine: the engine.
        """
        self.record.step(self.stats(), self._machine.scalars())

    def epoch_completed(self, engine: Engine) -> None:
        """Write a report if it is time for one.

        Args:
            engine: the engine.
        """
        if self.interval and engine.state.epoch % self.interval == 0:
            self.write()

    def completed(self, engine: Engine) -> None:
        """Write the report, and log its verdict.

        Args:
            engine: the engine.
        """
        ending = "The run was terminated early." if engine.should_terminate else ""
        self._conclude(ending)

    def interrupted(self, engine: Engine) -> None:
        """Write the report of a run that is interrupted and may go on.

        Args:
            engine: the engine.
        """
        self._conclude("The run was interrupted.")

    def failed(self, engine: Engine, error: BaseException) -> None:
        """Write the report of a run that failed.

        Args:
            engine: the engine.
            error: what it failed of, which goes on to whoever is next to deal with it.
        """
        if isinstance(error, GeneratorExit):  # an engine that was interrupted is given up
            return
        try:
            self._conclude(f"The run ended with {type(error).__name__}: {error}")
        except Exception:
            self.logger.exception("no report could be written of the run that failed.")

    def _raise(self, engine: Engine, error: BaseException) -> None:
        if not engine.should_terminate:  # by which another handler says that it has dealt with it
            raise error

    def _conclude(self, ending: str) -> None:
        path = self.write(ending)
        verdict, more, _ = self._report(ending).headline()
        self.logger.info("%s: %s", self._label(), " ".join(part for part in (verdict, more) if part))
        self.logger.info("%s: report in %s", self._label(), path)

    def write(self, ending: str = "") -> Path:
        """Write a report of the run up to now.

        Args:
            ending: a sentence about how the run ended.

        Returns:
            The page's path.

        Raises:
            ImportError: without matplotlib.
        """
        return self._report(ending).write(self.output_dir, self.path.stem)

    @property
    def path(self) -> Path:
        """Where the page is, once it is written."""
        rank = idist.get_rank()
        return self.output_dir / (f"report_rank_{rank}.html" if rank else "report.html")

    def stats(self) -> QueueStats:
        """The loader's figures, together with those of runs before that were in a checkpoint."""
        return self._continued(self.loader.stats())

    def state_dict(self) -> dict[str, Any]:
        """What was gathered, as plain values and tensors, for a checkpoint: about a megabyte."""
        return {"stats": as_plain(self.stats()), "record": self.record.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on gathering from ``state``.

        Args:
            state: what ``state_dict()`` gave.
        """
        self._continued = Continued(from_plain(state["stats"]), self.loader.stats())
        self.record.load_state_dict(state["record"])

    def _report(self, ending: str) -> RunReport:
        return RunReport(self.record, self.stats(), self.loader, self.name, ending, self.class_names)

    def _label(self) -> str:
        return f"{self.name} of rank {idist.get_rank()}" if idist.get_world_size() > 1 else self.name
