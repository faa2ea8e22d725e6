# SPDX-License-Identifier: Apache-2.0
"""A picture of what is sampled of a volume; needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .inspection import SampledVolume, as_percent
from .style import LIGHT, plain_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_sampling"]

_VIEWS = ("first", "second", "third")


def plot_sampling(sampled: SampledVolume) -> Figure:
    """A figure of where patches were taken, of the patches, and of the classes they hit.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'monai_patchqueue[plot]'. Without --output there is a table only."
        ) from error

    with styled(LIGHT):
        return _plot(Figure(figsize=(13, 6.7), layout="constrained", facecolor=LIGHT.paper), sampled)


def _plot(figure: Figure, sampled: SampledVolume) -> Figure:
    size = " × ".join(map(str, sampled.size))
    title = f"{len(sampled.starts)} patches of {size} voxels by {sampled.transform}"
    figure.suptitle(title, fontsize=15, weight="bold")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.15), wspace=0.03)
    if sampled.label is None:
        _plot_volume(halves[0], sampled)
    else:
        upper, lower = halves[0].subfigures(2, 1, height_ratios=(1.15, 1))
        _plot_volume(upper, sampled)
        _plot_classes(lower, sampled)
    _plot_patches(halves[1], sampled)
    return figure


def _plot_volume(figure: Any, sampled: SampledVolume) -> None:
    """Projections along each axis, with the centers."""
    extent = " × ".join(map(str, sampled.image.shape))
    caption = f"centers over the mean of {sampled.short_name}, {extent} voxels"
    figure.suptitle(caption, fontsize=9, color=LIGHT.muted)
    axes = sampled.image.ndim
    along: list[int | None] = [0, 1, 2] if axes == 3 else [None]
    kept_axes = [[a for a in range(axes) if a != axis] for axis in along]
    lengths = np.array(sampled.image.shape) * sampled.spacing
    widths = [float(lengths[kept[0]]) for kept in kept_axes]
    grid = figure.subplots(1, len(along), squeeze=False, width_ratios=widths)[0]
    classes = sampled.center_classes
    for ax, axis, kept in zip(grid, along, kept_axes, strict=True):
        mean = sampled.image.mean(axis=axis) if axis is not None else sampled.image
        aspect = sampled.spacing[kept[1]] / sampled.spacing[kept[0]]
        _show(ax, mean, aspect)
        for value in np.unique(classes):
            x, y = sampled.centers[classes == value][:, kept].T
            ax.scatter(x, y, s=9, color=LIGHT.of_class(int(value)), edgecolors="black", linewidths=0.3)
        if axis is not None:
            ax.set_title(f"along the {_VIEWS[axis]} axis", fontsize=8)


def _plot_classes(figure: Any, sampled: SampledVolume) -> None:
    """Bars of each class's share."""
    rows = sampled.classes()
    ax = figure.subplots()
    places = np.arange(len(rows))
    bars = (
        ("voxels of the volume", [row.volume for row in rows], LIGHT.muted, 0.3),
        ("voxels of patches", [row.patches for row in rows], LIGHT.muted, 0.7),
        ("centers", [row.centers for row in rows], LIGHT.main, 1.0),
    )
    for number, (name, shares, color, alpha) in enumerate(bars):
        percents = [100 * share for share in shares]
        bar = ax.bar(places + 0.29 * (number - 1), percents, 0.27, label=name, color=color, alpha=alpha)
        ax.bar_label(bar, fmt=lambda percent: as_percent(percent / 100), fontsize=7, padding=1)
    plain_axes(ax)
    ax.set_xticks(places, [f"class {row.value}" for row in rows])
    for tick, row in zip(ax.get_xticklabels(), rows, strict=True):
        tick.set_color(LIGHT.of_class(row.value))
        tick.set_fontweight("bold")
    ax.set_ylabel("share [%]")
    ax.margins(y=0.15)
    ax.legend()


def _plot_patches(figure: Any, sampled: SampledVolume) -> None:
    """The middle slice of patches as they come out of the pipeline, with their labels."""
    figure.suptitle(
        "patches as training gets them: middle slice with its label, and class at the center",
        fontsize=9,
        color=LIGHT.muted,
    )
    columns = 4 if len(sampled.shown) > 3 else max(len(sampled.shown), 1)
    rows = -(-len(sampled.shown) // columns)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    low, high = np.percentile([patch for patch, _ in sampled.shown], [0.5, 99.5])
    for ax, (patch, label) in zip(grid, sampled.shown, strict=False):
        _show(ax, _middle(patch), 1.0, low, high)
        if label is not None:
            _overlay(ax, _middle(label))
        middle = (np.array(patch.shape) - 1) / 2  # a flipped patch has its center on the other side of it
        ax.plot(middle[0], middle[1], "+", color="white", markersize=9, markeredgewidth=2.4)
        ax.plot(middle[0], middle[1], "+", color="black", markersize=8, markeredgewidth=1)
    for ax, value in zip(grid, sampled.center_classes, strict=False):
        if sampled.label is not None:
            for spine in ax.spines.values():
                spine.set(color=LIGHT.of_class(int(value)), linewidth=3, visible=True)
            ax.set_title(f"class {value}", fontsize=8, color=LIGHT.of_class(int(value)), weight="bold", pad=3)
    for ax in grid[len(sampled.shown) :]:
        ax.axis("off")


def _middle(volume: Any) -> Any:
    return volume[..., volume.shape[-1] // 2] if volume.ndim == 3 else volume


def _show(ax: Axes, image: Any, aspect: float, low: float | None = None, high: float | None = None) -> None:
    if low is None:
        low, high = np.percentile(image, [0.5, 99.5])
    ax.imshow(image.T, cmap="gray", origin="lower", aspect=aspect, vmin=low, vmax=high, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])


def _overlay(ax: Axes, label: Any) -> None:
    from matplotlib.colors import to_rgba

    tinted = np.zeros((*label.T.shape, 4))
    for value in np.unique(label[label > 0]):
        tinted[value == label.T] = to_rgba(LIGHT.of_class(int(value)), 0.5)
    ax.imshow(tinted, origin="lower", interpolation="nearest", aspect=ax.get_aspect())
