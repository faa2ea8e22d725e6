# SPDX-License-Identifier: Apache-2.0
"""Plots of the page on performance: bars of contestants, lines of limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from monai_patchqueue.report.style import Theme, as_png, plain_axes

from .bars import Results, Runs
from .cases import CASES
from .contestants import CONTESTANTS
from .report import figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.6
BAR = 0.23  # inches
THROUGHPUT = ("gz", "gz-large", "prepared", "prepared-large", "ram", "ram-0")
PACED = "gz"
Named = Mapping[str, float]


def plots(results: Results) -> dict[str, bytes]:
    """Pictures by name, of what was measured."""
    found: dict[str, bytes] = {}
    throughput = {name: results.runs[name] for name in THROUGHPUT if name in results.runs}
    if throughput:
        found["throughput"] = as_png(partial(_throughput, throughput))
    if PACED in results.runs:
        found["paced"] = as_png(partial(_paced, results.runs[PACED]))
    if results.sampling:
        found["sampling"] = as_png(partial(_sampling, results.sampling))
    return found


def _throughput(cases: Mapping[str, Runs], theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    heights = [BAR * len(runs) + 0.55 for runs in cases.values()]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (case, runs) in zip(panels, cases.items(), strict=True):
        _bars(axes, _medians(runs, "free.patches_per_s"), _title_of, theme, "{:.0f}")
        axes.set_title(CASES[case].title, loc="left")
    panels[-1].set_xlabel("patches per second")
    return figure


def _paced(runs: Runs, theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    runs = {name: of_contestant for name, of_contestant in runs.items() if not _is_limit(name)}
    figure = Figure(figsize=(WIDTH, BAR * len(runs) + 0.9), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    columns = (
        ("paced.stalled", 100.0, "{:.1f}", "stalled [% of the time]"),
        ("paced.wait_p99_ms", 1.0, "{:.0f}", "99th percentile of waits [ms]"),
        ("peak_pss_mib", 1.0, "{:.0f}", "peak memory (PSS) [MiB]"),
    )
    for axes, (figure_name, factor, text, label) in zip(panels, columns, strict=True):
        values = {name: factor * value for name, value in _medians(runs, figure_name).items()}
        _bars(axes, values, _title_of, theme, text)
        axes.set_xlabel(label)
    return figure


def _sampling(results: Sequence[Mapping[str, Any]], theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    smallest = min(result["scene"]["patch_size"] for result in results)
    shown = [result for result in results if result["scene"]["patch_size"] == smallest]
    kinds = sorted({result["scene"]["kind"] for result in shown})
    shapes = sorted({tuple(result["scene"]["shape"]) for result in shown})
    figure = Figure(figsize=(WIDTH, 3.2 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), len(shapes), squeeze=False, sharey="row")
    for result in shown:
        scene = result["scene"]
        axes = panels[kinds.index(scene["kind"]), shapes.index(tuple(scene["shape"]))]
        times = {name: median(of_way) for name, of_way in result["ms"].items()}
        _bars(axes, times, lambda name, result=result: result["titles"][name], theme, "{:.1f}")
        axes.set_xscale("log")
        axes.set_xlim(left=0.5)
        axes.set_title(f"{scene['kind']}, {'×'.join(map(str, scene['shape']))}", loc="left")
        axes.set_xlabel(f"ms for {scene['num_samples']} patches of {scene['patch_size']}³")
    return figure


def _bars(axes: Axes, values: Named, title_of: Callable[[str], str], theme: Theme, text: str) -> None:
    """A bar for each contestant, ours coloured and first; below them each limit, as a line through the panel."""
    rows = sorted(values, key=lambda name: (_is_limit(name), not _is_ours(name)))
    bars = [name for name in rows if not _is_limit(name)]
    colors = [theme.main if _is_ours(name) else theme.muted for name in bars]
    drawn = axes.barh(range(len(bars)), [values[name] for name in bars], color=colors, height=0.72)
    axes.bar_label(drawn, [text.format(values[name]) for name in bars], padding=3, fontsize=7.5)
    for row, name in enumerate(rows[len(bars) :], start=len(bars)):
        axes.axvline(values[name], color=theme.waiting, linewidth=1, linestyle="--", zorder=0)
        axes.plot(values[name], row, marker="D", markersize=4, color=theme.waiting)
        place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 7.5}
        axes.annotate(text.format(values[name]), (values[name], row), color=theme.waiting, **place)
    axes.set_yticks(range(len(rows)), [title_of(name) for name in rows], fontsize=7.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.12)
    plain_axes(axes, "x")


def _medians(runs: Runs, figure_name: str) -> dict[str, float]:
    return {name: median(figure_of(run, figure_name) for run in of_contestant) for name, of_contestant in runs.items()}


def _title_of(name: str) -> str:
    return CONTESTANTS[name].title.replace(" (all in RAM)", "").replace(" into memory at hand", "")


def _is_ours(name: str) -> bool:
    return name.startswith(("patchqueue", "ours"))


def _is_limit(name: str) -> bool:
    return name.startswith("limit")  # of loaders and of sampling
