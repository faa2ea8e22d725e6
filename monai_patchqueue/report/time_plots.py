# SPDX-License-Identifier: Apache-2.0
"""Plots of how fast a run was: waiting, the queue's fill, stages, memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..queue.stats import QueueStats
from .run_record import RunRecord
from .style import Theme, format_count, format_seconds, percent, plain_axes, time_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["capacity", "fill", "gpu", "memory", "stage_rates", "transforms", "wait_histogram", "waits"]

_SIZE = (6.4, 2.7)
# A moving mean is one over so many bins.
_SMOOTH = 25
_MIB, _GIB = 2.0**20, 2.0**30


def _figure(height: float = _SIZE[1]) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    return figure, figure.add_subplot()


def _epochs(axes: Axes, record: RunRecord, unit: float, theme: Theme) -> None:
    """Mark where epochs begin, while they can be told apart."""
    history = record.history
    begins = history["time"][1:][np.diff(history["epoch"]) > 0]
    if 0 < len(begins) <= 40:
        for begin in begins:
            axes.axvline(begin / unit, color=theme.grid, linewidth=1, zorder=0)


def waits(record: RunRecord, theme: Theme) -> Figure:
    """How long batches were waited for, over time: the longest of each bin, a moving mean, and the worst stalls."""
    figure, axes = _figure()
    history = record.history
    plain_axes(axes)
    unit = time_axis(axes, float(record.history["time"][-1]))
    times = history["time"] / unit
    _epochs(axes, record, unit, theme)
    scale, name = (1.0, "s") if history["longest"].max(initial=0) >= 0.5 else (1000.0, "ms")
    axes.vlines(times, 0, history["longest"] * scale, color=theme.waiting, linewidth=1.4, label="longest")
    if len(history) >= 2 * _SMOOTH:
        axes.plot(times, _moving_mean(record) * scale, color=theme.ink, linewidth=1.1, label="moving mean")
        axes.legend(loc="upper right", ncols=2)
    top = max(float(history["longest"].max(initial=0)) * scale, 1e-9)
    worst = sorted(record.stalls, reverse=True)[:3]
    for stall in worst:
        if stall.seconds * scale > top / 4:
            right = stall.time / unit > 0.85 * times[-1]
            axes.annotate(
                f"{format_seconds(stall.seconds)}, step {stall.step}",
                (stall.time / unit, stall.seconds * scale),
                (-4 if right else 4, 1),
                textcoords="offset points",
                fontsize=7.5,
                color=theme.muted,
                ha="right" if right else "left",
                va="bottom",
            )
    axes.set_ylim(0, 1.25 * top)
    axes.set_xlim(0, max(float(times[-1]), 1e-9))
    axes.set_ylabel(f"wait for a batch [{name}]")
    return figure


def _moving_mean(record: RunRecord) -> np.ndarray[Any, Any]:
    window = np.ones(_SMOOTH)
    waited, steps = (np.convolve(record.history[name], window, "same") for name in ("wait", "steps"))
    mean: np.ndarray[Any, Any] = waited / steps
    return mean


def wait_histogram(record: RunRecord, stats: QueueStats, theme: Theme) -> Figure:
    """How many batches were waited for how long, and, on the same axis, how long a step takes."""
    figure, axes = _figure()
    plain_axes(axes)
    counts, edges = record.waits.counts, record.waits.edges
    used = np.flatnonzero(counts)
    first, last = (used[0], used[-1]) if len(used) else (0, 1)
    places = np.arange(first, last + 1)
    axes.bar(edges[places], counts[places], np.diff(edges)[places] * 0.92, align="edge", color=theme.waiting)
    axes.set_ylim(0, 1.18 * max(int(counts.max()), 1))
    axes.set_xscale("log")
    if stats.step_seconds:
        axes.axvline(stats.step_seconds, color=theme.ink, linewidth=1.2)
        axes.annotate(
            f"a step takes {format_seconds(stats.step_seconds)}",
            (stats.step_seconds, 1.0),
            (5, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            fontsize=7.5,
        )
    left = min(edges[first], stats.step_seconds or edges[first]) / 1.5
    axes.set_xlim(left, max(edges[last + 1], 4 * stats.step_seconds) * 1.5)
    ticks = [10.0**n for n in range(-5, 5) if left <= 10.0**n <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [format_seconds(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("wait for a batch (logarithmic)")
    axes.set_ylabel("batches")
    return figure


def fill(record: RunRecord, theme: Theme) -> Figure:
    """How full the queue was."""
    figure, axes = _figure()
    plain_axes(axes)
    unit = time_axis(axes, float(record.history["time"][-1]))
    times, share = record.history["time"] / unit, 100 * record.history.mean("fill")
    _epochs(axes, record, unit, theme)
    axes.fill_between(times, 0, share, color=theme.main, alpha=0.22, linewidth=0)
    axes.plot(times, share, color=theme.main)
    axes.set_ylim(0, 102)
    axes.set_xlim(0, max(float(times[-1]), 1e-9))
    axes.set_ylabel("patches ready\n[% of the queue]")
    return figure


def stage_rates(stats: QueueStats) -> dict[str, float]:
    """Patches a second that each stage would give if it never had to wait for another.

    Example:
        >>> stats = QueueStats(batches=10, patches=40, volumes=5, reuse=1.0, num_workers=2,
        ...                    load_seconds=0.8, step_seconds=0.05)
        >>> stage_rates(stats)
        {'2 workers': 20.0, 'training step': 80.0}
    """
    batch = stats.patches / stats.batches if stats.batches else 0.0
    # Of the volumes prepared some are still in the queue; all give about as many patches.
    per_volume = stats.patches / stats.volumes if stats.volumes else 0.0
    volume = stats.load_seconds + stats.sample_seconds + stats.write_seconds
    assembly = stats.assemble_seconds + stats.item_transform_seconds + stats.batch_transform_seconds
    workers = (
        f"{stats.num_workers} workers" if stats.num_workers > 1 else "1 worker" if stats.num_workers else "preparing"
    )
    rates = {
        workers: max(stats.num_workers, 1) * per_volume / volume if volume else 0.0,
        "assembly": batch / assembly if assembly else 0.0,
        "training step": batch / stats.step_seconds if stats.step_seconds else 0.0,
    }
    return {name: rate for name, rate in rates.items() if rate}


def capacity(stats: QueueStats, theme: Theme) -> Figure:
    """What each stage could give by itself, beside what came of it."""
    figure, axes = _figure(0.9 + 0.42 * len(stage_rates(stats)))
    plain_axes(axes, "x")
    rates = stage_rates(stats)
    slowest = min(rates, key=rates.__getitem__, default="")
    names = list(rates)[::-1]
    colors = [theme.waiting if name == slowest and name != "training step" else theme.main for name in names]
    axes.barh(names, [rates[name] for name in names], 0.62, color=colors)
    limit = min(max(rates.values(), default=1.0), 8 * stats.patches_per_second or 1.0)
    for place, name in enumerate(names):
        inside = rates[name] > 0.75 * limit
        axes.annotate(
            f"{format_count(rates[name])}{' →' if rates[name] > limit else ''}",
            (min(rates[name], limit), place),
            (-5 if inside else 5, 0),
            textcoords="offset points",
            va="center",
            ha="right" if inside else "left",
            color=theme.paper if inside else theme.ink,
            fontsize=8,
        )
    axes.axvline(stats.patches_per_second, color=theme.ink, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.annotate(
        f"delivered: {format_count(stats.patches_per_second)}",
        (stats.patches_per_second, 1.0),
        (4, 2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        fontsize=8,
        annotation_clip=False,
    )
    axes.set_xlim(0, limit * 1.02)
    axes.set_xlabel("patches per second that a stage could give by itself")
    axes.spines["left"].set_visible(False)
    return figure


def transforms(seconds: Mapping[str, float], theme: Theme) -> Figure:
    """Where a worker's time goes, in the pipeline's order."""
    figure, axes = _figure(0.7 + 0.3 * len(seconds))
    plain_axes(axes, "x")
    names = list(seconds)[::-1]
    total = sum(seconds.values()) or 1.0
    most = max(seconds.values(), default=0.0)
    colors = [theme.waiting if seconds[name] == most else theme.main for name in names]
    axes.barh(names, [1000 * seconds[name] for name in names], 0.66, color=colors)
    for place, name in enumerate(names):
        axes.annotate(
            f"{format_seconds(seconds[name])} · {percent(seconds[name] / total)}",
            (1000 * seconds[name], place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=theme.ink,
        )
    axes.set_xlim(0, 1000 * (most or 1.0) * 1.28)
    axes.set_xlabel("a worker's time per volume [ms]")
    axes.spines["left"].set_visible(False)
    return figure


def memory(record: RunRecord, stats: QueueStats, theme: Theme) -> Figure:
    """Memory of the process and its workers, the queue's share of it, and the GPU's."""
    figure, axes = _figure(2.2)
    plain_axes(axes)
    unit = time_axis(axes, float(record.history["time"][-1]))
    times, resident = record.history["time"] / unit, record.history["memory"]
    scale, name = (_GIB, "GiB") if np.nanmax(resident, initial=0) >= _GIB else (_MIB, "MiB")
    _line(axes, times, resident / scale, theme.main, "this process and its workers")
    axes.axhline(stats.slab_bytes / scale, color=theme.waiting, linewidth=1.5, label="of it, the queue's patches")
    on_gpu: Any = record.history["gpu_memory"]
    if np.isfinite(on_gpu).any():
        _line(axes, times, on_gpu / scale, theme.good, "GPU, all processes")
    axes.set_ylim(0, None)
    low, high = axes.get_ylim()
    axes.set_ylim(low, 1.3 * high)
    axes.set_xlim(0, max(float(times[-1]), 1e-9))
    axes.set_ylabel(f"memory [{name}]")
    axes.legend(loc="upper left", ncols=3)
    return figure


def gpu(record: RunRecord, theme: Theme) -> Figure:
    """The share of time in which the GPU was computing."""
    figure, axes = _figure(2.2)
    plain_axes(axes)
    unit = time_axis(axes, float(record.history["time"][-1]))
    times = record.history["time"] / unit
    _line(axes, times, 100 * record.history.mean("gpu"), theme.good, None)
    axes.set_ylim(0, 102)
    axes.set_xlim(0, max(float(times[-1]), 1e-9))
    axes.set_ylabel("GPU busy [%]")
    return figure


def _line(axes: Axes, times: Any, values: Any, color: str, label: str | None) -> None:
    axes.plot(times, values, color=color, label=label)
    axes.fill_between(times, 0, values, color=color, alpha=0.12, linewidth=0)
