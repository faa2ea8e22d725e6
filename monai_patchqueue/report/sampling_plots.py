# SPDX-License-Identifier: Apache-2.0
"""Plots of what was sampled: volumes, classes, and where in the volumes patches lay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..queue.stats import ByVolume, QueueStats
from .patch_map import PatchMap
from .style import LIGHT, Theme, format_count, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["caption_of_volumes", "classes", "deviations", "patch_map", "shares", "volumes"]

# More volumes than these are drawn as one outline.
_FEW = 40
# More centers than these are drawn as a picture.
_VECTORS = 300
_AXES = "xyzw"


def deviations(stats: QueueStats) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Patches of each volume that were seen and that were expected, up to the last volume that has either.

    Where no order is known, each volume is expected to give the same.
    """
    seen, expected = (ByVolume.of(part).array.astype(float) for part in (stats.volume_counts, stats.volume_expected))
    if not expected.any():
        expected = np.full(len(seen), seen.mean() if len(seen) else 0.0)
    length = max(len(seen), len(expected))
    seen, expected = (np.pad(part, (0, length - len(part))) for part in (seen, expected))
    number = int(np.flatnonzero((seen > 0) | (expected > 0)).max(initial=-1)) + 1
    return seen[:number], expected[:number]


def volumes(stats: QueueStats, theme: Theme) -> Figure:
    """Patches of each volume, seen against expected, and by how much they differ."""
    from matplotlib.figure import Figure

    seen, expected = deviations(stats)
    if len(seen) > _FEW:
        order = np.argsort(-expected, kind="stable")
        seen, expected = seen[order], expected[order]
    off = np.where(expected > 0, 100 * (seen / np.maximum(expected, 1e-9) - 1), 100.0 * (seen > 0))
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    plain_axes(above)
    plain_axes(below)
    places = np.arange(len(seen))
    if len(seen) <= _FEW:
        above.bar(places, seen, 0.7, color=theme.main, label="seen")
        below.bar(places, off, 0.7, color=theme.waiting)
        above.hlines(expected, places - 0.42, places + 0.42, color=theme.ink, linewidth=1.6, label="expected")
        below.set_xticks(places if len(places) <= 20 else places[::5])
        below.set_xlim(-0.6, len(seen) - 0.4)
    else:
        edges = np.arange(len(seen) + 1) - 0.5
        above.stairs(seen, edges, fill=True, color=theme.main, label="seen")
        above.stairs(expected, edges, color=theme.ink, linewidth=1.2, label="expected", baseline=None)
        below.stairs(off, edges, fill=True, color=theme.waiting)
        below.set_xlim(-0.5, len(seen) - 0.5)
    above.set_ylim(0, 1.3 * max(float(seen.max(initial=1)), float(expected.max(initial=1))))
    above.set_ylabel("patches")
    above.legend(loc="upper right", ncols=2)
    most = max(float(np.abs(off).max(initial=0)), 5.0)
    below.set_ylim(-1.15 * most, 1.15 * most)
    below.axhline(0, color=theme.muted, linewidth=0.8)
    below.set_ylabel("deviation [%]")
    few = len(seen) <= _FEW
    below.set_xlabel("volume, by its place in the data list" if few else "volumes, the most asked for first")
    return figure


def classes(
    centers: Mapping[int, int],
    voxels: Mapping[int, float],
    asked: Mapping[int, float] | None,
    names: Mapping[int, str],
    theme: Theme,
) -> Figure:
    """Which classes lie at patches' centers, which were asked for, and how frequent they are in the patches."""
    from matplotlib.figure import Figure

    labels = sorted({*centers, *(label for label, share in voxels.items() if share), *(asked or {})})
    figure = Figure(figsize=(6.4, 0.9 + 0.45 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    plain_axes(axes, "x")
    total = sum(centers.values()) or 1
    places = np.arange(len(labels))[::-1]
    seen = np.array([100 * centers.get(label, 0) / total for label in labels])
    natural = np.array([100 * voxels.get(label, 0.0) for label in labels])
    axes.barh(places + 0.14, seen, 0.44, color=[theme.of_class(label) for label in labels], label="at centers")
    axes.barh(places - 0.24, natural, 0.18, color=theme.muted, alpha=0.55, label="of the patches' voxels")
    if asked is not None:
        wanted = [100 * asked.get(label, 0.0) for label in labels]
        axes.vlines(wanted, places - 0.12, places + 0.4, color=theme.ink, linewidth=2, label="asked for")
    top = max(float(seen.max(initial=0)), float(natural.max(initial=0)), 1.0)
    for place, share, label in zip(places, seen, labels, strict=True):
        at = max(share, 100 * asked.get(label, 0.0) if asked is not None else 0.0)
        axes.annotate(
            f"{share:.1f} %",
            (at, place + 0.14),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=theme.ink,
        )
    axes.set_yticks(places, [names.get(label, f"class {label}") for label in labels])
    axes.set_xlim(0, 1.15 * top)
    axes.set_xlabel("share [%]")
    axes.spines["left"].set_visible(False)
    handles, texts = axes.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=3)
    return figure


def patch_map(places: PatchMap, names: Mapping[int, str], theme: Theme) -> Figure:
    """The patches' centers over the mean volume, seen along each axis."""
    from matplotlib.figure import Figure

    ndim = len(places.centers[0][0])
    views = [(0, 1, 2), (0, 2, 1), (1, 2, 0)] if ndim == 3 else [(0, 1, -1)]
    figure = Figure(figsize=(10.4, 3.9) if len(views) > 1 else (6.4, 4.2), layout="constrained")
    points = np.array([center for center, _ in places.centers])
    labels = [label for _, label in places.centers]
    # On a grey picture on light and dark pages alike, and so many that they are better drawn as a picture.
    colors: dict[str, Any] = {"rasterized": len(points) > _VECTORS, "alpha": 0.9 if len(points) < 300 else 0.7}
    size = 4.0 if len(points) < 300 else 2.6 if len(points) < 1500 else 2.0
    # Frequent classes first, so that they do not hide the others.
    order = sorted(set(labels), key=labels.count, reverse=True)
    for axes, (right, up, along) in zip(figure.subplots(1, len(views), squeeze=False)[0], views, strict=True):
        _mean_volume(axes, places.projection(along))
        for label in order:
            chosen = points[[each == label for each in labels]]
            axes.plot(
                chosen[:, right],
                chosen[:, up],
                linestyle="none",
                marker="o",
                markersize=size,
                markeredgewidth=0,
                color=LIGHT.waiting if label is None else LIGHT.of_class(label),
                label="patch center" if label is None else names.get(label, f"class {label}"),
                **colors,
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        axes.grid(False)
        axes.set_xticks([0, 1], ["0", "1"])
        axes.set_yticks([0, 1], ["0", "1"])
        axes.tick_params(length=0)
        axes.set_xlabel(f"{_AXES[right]}, of the volume's length", labelpad=-4)
        axes.set_ylabel(_AXES[up], labelpad=-4)
    handles, texts = figure.axes[0].get_legend_handles_labels()
    by_label = np.argsort([-1 if label is None else label for label in order])
    figure.legend(
        [handles[place] for place in by_label],
        [texts[place] for place in by_label],
        loc="outside upper center",
        ncols=min(len(order), 8),
        markerscale=6 / size,
    )
    return figure


def _mean_volume(axes: Axes, projection: np.ndarray[Any, Any] | None) -> None:
    if projection is None or not np.isfinite(projection).any():
        return
    low, high = np.nanpercentile(projection, [1, 99])
    axes.imshow(
        projection.T,
        cmap="gray",
        vmin=float(low),
        vmax=float(max(high, low + 1e-6)),
        extent=(0, 1, 0, 1),
        origin="lower",
        interpolation="bilinear",
    )


def shares(counts: Mapping[int, float]) -> dict[int, float]:
    """Counts as shares of their sum.

    Example:
        >>> shares({0: 3, 1: 1})
        {0: 0.75, 1: 0.25}
    """
    total = sum(counts.values()) or 1.0
    return {label: count / total for label, count in counts.items()}


def caption_of_volumes(stats: QueueStats) -> str:
    """What the plot of volumes says, in a sentence."""
    seen, expected = deviations(stats)
    if not len(seen):
        return "No volume was drawn from."
    off = 100 * np.abs(seen / np.maximum(expected, 1e-9) - 1)[expected > 0]
    return (
        f"{int((seen > 0).sum())} volumes gave {format_count(seen.sum())} patches; they deviate from what the sampler "
        f"asked for by {off.mean():.1f} % on average, at most {off.max():.0f} %."
    )
