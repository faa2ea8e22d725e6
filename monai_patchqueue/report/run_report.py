# SPDX-License-Identifier: Apache-2.0
"""From the record of a run to its report: a page, the same plots as pictures, and a headline."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..queue.stats import QueueStats
from . import sampling_plots, time_plots
from .asked import asked_shares
from .diagnosis import Diagnosis, diagnose
from .page import Page, Section
from .run_record import RunRecord
from .style import Theme, as_png, as_svg, format_count, format_seconds, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RunReport"]


@dataclass(frozen=True)
class _Plot:
    section: str
    name: str
    title: str
    draw: Callable[[Theme], Figure]
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class RunReport:
    """A report of a run.

    Args:
        record: what was gathered.
        stats: the loader's figures, those of runs before included.
        loader: the loader, to see its settings and its transforms.
        name: what is reported on.
        ending: how the run ended, where that is worth a word.
        class_names: what to call the classes of the label map.
    """

    record: RunRecord
    stats: QueueStats
    loader: Any
    name: str = "queue"
    ending: str = ""
    class_names: Mapping[int, str] = field(default_factory=dict)

    def diagnosis(self) -> Diagnosis | None:
        """Why batches were waited for in this run; ``None`` where the loader does not show its settings."""
        settings = getattr(self.loader, "settings", None)
        return diagnose(self.loader.stats(), settings()) if callable(settings) else None

    @property
    def starved(self) -> float:
        """Share of the time that was spent waiting, as the verdict has it."""
        diagnosis = self.diagnosis()
        return self.stats.starved if diagnosis is None else diagnosis.starved

    def headline(self) -> tuple[str, str, bool]:
        """The verdict, what else there is to say about it, and whether it is good."""
        stats = self.stats
        diagnosis = self.diagnosis()
        if not stats.batches:
            return "No batch was drawn.", self.ending, False
        good = not diagnosis.causes if diagnosis else stats.bottleneck == "consumer"
        if diagnosis is not None:
            verdict, _, more = diagnosis.text.partition(". ")
            verdict = verdict[0].upper() + verdict[1:].rstrip(".") + "."
        else:
            verdict, more = f"Starved {percent(stats.starved)} of the time; bottleneck: {stats.bottleneck}.", ""
        return verdict, " ".join(part for part in (self.ending, more) if part), good

    def write(self, folder: Path, stem: str = "report") -> Path:
        """Write ``<stem>.html``, and the plots as pictures under ``<stem>/``.

        Returns:
            The page's path.

        Raises:
            ImportError: without matplotlib.
        """
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise ImportError("the report needs matplotlib: pip install monai_patchqueue[plot].") from error
        pictures = folder / stem
        pictures.mkdir(parents=True, exist_ok=True)
        plots = list(self._plots())
        for plot in plots:
            (pictures / f"{plot.name}.png").write_bytes(as_png(plot.draw))
        path = folder / f"{stem}.html"
        path.write_text(self._page(plots).html(), encoding="utf-8")
        return path

    def _page(self, plots: list[_Plot]) -> Page:
        headline, more, good = self.headline()
        sections = []
        for title in dict.fromkeys(plot.section for plot in plots):
            drawn = [(p.title, as_svg(p.draw, p.name), p.caption, p.wide) for p in plots if p.section == title]
            sections.append(Section(title, drawn, self._stalls() if title == _WAITING else None))
        now = datetime.datetime.now().astimezone()
        return Page(
            title=f"{self.name}: {headline}",
            kicker=f"{self.name} · {self._scope()} · {now:%Y-%m-%d %H:%M %Z}",
            headline=headline,
            good=good,
            more=more,
            tiles=self._tiles(),
            sections=sections,
            footer=f"Written by monai_patchqueue. {re.sub(r' at 0x[0-9a-f]+', '', repr(self.loader))}",
        )

    def _scope(self) -> str:
        stats, record = self.stats, self.record
        epochs, seconds = stats.epoch + 1, float(record.history["time"][-1]) if len(record.history) else 0.0
        return f"{epochs} epoch{'s' * (epochs > 1)}, {stats.batches} batches in {format_seconds(seconds)}"

    def _tiles(self) -> dict[str, str]:
        stats, record = self.stats, self.record
        memory = record.history["memory"]
        tiles = {
            "of the time waiting for batches": percent(self.starved),
            "patches a second": format_count(stats.patches_per_second),
            "mean wait for a batch": format_seconds(stats.wait_seconds),
            "longest wait": format_seconds(stats.max_wait_seconds),
            "of the queue filled, on average": percent(np.average(record.history.mean("fill"))) if len(memory) else "–",
            "volumes in a batch": f"{stats.volumes_per_batch:.1f}",
            "draws of each patch": f"{stats.reuse:.3g}",
        }
        if record.tally is not None:
            tiles["of patches with foreground"] = percent(record.tally.foreground_share)
        if len(memory) and np.isfinite(memory).any():
            tiles["of memory at most"] = f"{np.nanmax(memory) / 2**30:.1f} GiB"
        busy = record.history.mean("gpu")
        if len(busy) and np.isfinite(busy).any():
            tiles["of the time the GPU was busy"] = percent(np.nanmean(busy))
        if stats.failures:
            tiles["volumes failed"] = f"{stats.failures}"
        return tiles

    def _stalls(self) -> tuple[str, list[str], list[list[str]]] | None:
        rows = [
            [
                format_seconds(stall.seconds),
                str(stall.step),
                str(stall.epoch + 1),
                format_seconds(stall.time),
                percent(stall.fill),
            ]
            for stall in sorted(self.record.stalls, reverse=True)[:8]
            if stall.seconds > 2 * self.stats.wait_seconds or stall.seconds > self.stats.step_seconds / 5
        ]
        return ("The longest waits", ["wait", "step", "epoch", "after", "queue filled"], rows) if rows else None

    def _plots(self) -> Iterator[_Plot]:
        record, stats = self.record, self.stats
        if not len(record.history):
            return
        yield _Plot(
            _WAITING,
            "waits",
            "Wait for each batch",
            partial(time_plots.waits, record),
            f"{percent(self.starved)} of the time was spent waiting for batches, the very first apart. Thin lines mark "
            "where epochs begin.",
        )
        yield _Plot(
            _WAITING,
            "wait_histogram",
            "How long batches were waited for",
            partial(time_plots.wait_histogram, record, stats),
            "What lies left of a step's time hardly slows training down.",
        )
        yield _Plot(
            _WAITING,
            "fill",
            "How full the queue was",
            partial(time_plots.fill, record),
            f"Patches ready, of a queue of {stats.queue_length}.",
        )
        yield _Plot(
            _STAGES,
            "capacity",
            "What each stage could give",
            partial(time_plots.capacity, stats),
            f"The shortest bar limits the rest. Delivered: {format_count(stats.patches_per_second)} patches a second.",
        )
        if any(stats.transform_seconds.values()):
            seconds = {**stats.transform_seconds, "write": stats.write_seconds}
            total = stats.load_seconds + stats.sample_seconds + stats.write_seconds
            yield _Plot(
                _STAGES,
                "transforms",
                "Where workers spend their time",
                partial(time_plots.transforms, seconds),
                f"{format_seconds(total)} per volume, in the pipeline's order; workers were busy "
                f"{percent(stats.worker_busy)} of the time.",
            )
        yield from self._sampling_plots()
        if np.isfinite(record.history["memory"]).any():
            yield _Plot(
                _RESOURCES,
                "memory",
                "Memory",
                partial(time_plots.memory, record, stats),
                "Resident memory; the queue's patches lie in memory that workers share.",
            )
        if np.isfinite(record.history["gpu"]).any():
            yield _Plot(
                _RESOURCES, "gpu", "GPU", partial(time_plots.gpu, record), "Share of time in which the GPU computed."
            )

    def _sampling_plots(self) -> Iterator[_Plot]:
        record, stats = self.record, self.stats
        yield _Plot(
            _SAMPLED,
            "volumes",
            "Patches of each volume",
            partial(sampling_plots.volumes, stats),
            sampling_plots.caption_of_volumes(stats),
        )
        if record.tally is not None and record.tally.centers:
            voxels = sampling_plots.shares(record.voxels)
            asked = asked_shares(getattr(self.loader, "dataset", None), voxels)
            shares, words = asked if asked is not None else (None, "")
            yield _Plot(
                _SAMPLED,
                "classes",
                "Classes at the patches' centers",
                partial(sampling_plots.classes, record.tally.centers, voxels, shares, self.class_names),
                f"Asked for by {words}; a class that a volume lacks is left out there."
                if words
                else "No transform asks for classes.",
            )
        if record.map is not None and record.map.centers:
            yield _Plot(
                _SAMPLED,
                "patch_map",
                "Where patches were taken",
                partial(sampling_plots.patch_map, record.map, self.class_names),
                f"Centers of {format_count(len(record.map.centers))} of {format_count(record.map.seen)} patches over "
                "the mean of all volumes, put together from patches.",
                wide=len(record.map.centers[0][0]) > 2,
            )


_WAITING = "Was training kept waiting?"
_STAGES = "How fast is each stage?"
_SAMPLED = "What was sampled?"
_RESOURCES = "What did it take?"
