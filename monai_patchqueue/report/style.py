# SPDX-License-Identifier: Apache-2.0
"""How plots look: one set of colours by role, for pictures and for a page that is light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DARK",
    "LIGHT",
    "Theme",
    "as_png",
    "as_svg",
    "css_variables",
    "format_count",
    "format_seconds",
    "percent",
    "plain_axes",
    "styled",
    "time_axis",
]


@dataclass(frozen=True)
class Theme:
    """Colours by what they stand for. ``classes`` are told apart with colour-blind eyes too (after Okabe and Ito)."""

    paper: str
    ink: str
    muted: str
    grid: str
    main: str
    waiting: str
    good: str
    classes: tuple[str, ...]

    def of_class(self, label: int) -> str:
        """A class's colour: grey for class 0, the others in turn."""
        return self.classes[0 if label == 0 else 1 + (label - 1) % (len(self.classes) - 1)]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1b1f24",
    muted="#6a737d",
    grid="#e3e6ea",
    main="#2b6cb0",
    waiting="#d4622a",
    good="#2f855a",
    classes=("#8a939d", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a400"),
)
DARK = Theme(
    paper="#16191d",
    ink="#e8eaed",
    muted="#99a2ad",
    grid="#2c3138",
    main="#63a4e8",
    waiting="#f0884f",
    good="#56b886",
    classes=("#aab2bc", "#4aa8e0", "#f0b429", "#2fc79a", "#e394c2", "#8fd0f5", "#f58042", "#dccb3a"),
)
# Stand-ins in an SVG, which become the page's variables: it is light or dark as its reader has it.
_VARIABLES = Theme(
    paper="#00fe01",
    ink="#00fe02",
    muted="#00fe03",
    grid="#00fe04",
    main="#00fe05",
    waiting="#00fe06",
    good="#00fe07",
    classes=tuple(f"#00fd0{i}" for i in range(8)),
)
# Text is measured with a font that is at hand, and shown in the page's.
_STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "axes.titlesize": 9.0,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "savefig.transparent": True,
}


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """Within the block, figures are made in a theme's style."""
    import matplotlib as mpl

    colors = {
        "text.color": theme.ink,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.grid,
    }
    with mpl.rc_context({**_STYLE, **colors}):
        yield


def as_svg(draw: Callable[[Theme], Figure], name: str) -> str:
    """A plot as an ``<svg>`` element whose colours are the page's CSS variables (``--ink``, ``--class-1`` …)."""
    import matplotlib as mpl

    text = io.StringIO()
    with styled(_VARIABLES), mpl.rc_context({"svg.hashsalt": name}):
        draw(_VARIABLES).savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    for color, variable in css_variables(_VARIABLES).items():
        svg = svg.replace(variable, f"var(--{color})")
    return svg


def as_png(draw: Callable[[Theme], Figure]) -> bytes:
    """A plot as a picture, on white."""
    picture = io.BytesIO()
    with styled(LIGHT):
        draw(LIGHT).savefig(picture, format="png", dpi=160, facecolor=LIGHT.paper, transparent=False)
    return picture.getvalue()


def css_variables(theme: Theme) -> dict[str, str]:
    """A theme's colours by the names that CSS has for them."""
    single = {f.name: getattr(theme, f.name) for f in fields(theme) if f.name != "classes"}
    return {**single, **{f"class-{index}": color for index, color in enumerate(theme.classes)}}


def plain_axes(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """Grid along one axis only, and no tick marks."""
    axes.grid(False)
    axes.grid(True, axis=grid)
    axes.tick_params(length=0)


def time_axis(axes: Axes, last: float) -> float:
    """Label an axis of time in the unit that suits its length; what seconds are to be divided by."""
    for unit, size, least in (("hours", 3600.0, 2 * 3600.0), ("minutes", 60.0, 150.0)):
        if last >= least:
            axes.set_xlabel(f"time since the start [{unit}]")
            return size
    axes.set_xlabel("time since the start [s]")
    return 1.0


def format_seconds(seconds: float) -> str:
    """A duration, short, with its unit.

    Example:
        >>> [format_seconds(s) for s in (0.00012, 0.232, 1.23, 75, 7300)]
        ['0.12 ms', '232 ms', '1.2 s', '75 s', '2.0 h']
    """
    if seconds < 1:
        return f"{1000 * seconds:.2g} ms" if seconds < 0.01 else f"{1000 * seconds:.0f} ms"
    if seconds < 600:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def percent(share: float) -> str:
    """A share in percent.

    Example:
        >>> percent(0.123)
        '12 %'
    """
    return f"{100 * share:.0f} %"


def format_count(number: float) -> str:
    """A large number, short.

    Example:
        >>> format_count(950), format_count(12345), format_count(3.4e6)
        ('950', '12.3 k', '3.4 M')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"
