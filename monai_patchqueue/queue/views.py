# SPDX-License-Identifier: Apache-2.0
"""A queue's figures at a glance: a line for terminals, a table for notebooks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .stats import QueueStats

__all__ = ["as_html", "as_line", "gauge"]

_EIGHTHS = " ▏▎▍▌▋▊▉"


def gauge(share: float, width: int = 8) -> str:
    """A share as a bar of text.

    Example:
        >>> gauge(0.55, 4)
        '██▎ '
    """
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    whole, rest = divmod(eighths, 8)
    return f"{'█' * whole}{_EIGHTHS[rest] if rest else ''}".ljust(width)


def as_line(stats: QueueStats) -> str:
    """The figures to look at while a run goes on: fill, starved, and the bottleneck.

    Example:
        >>> from monai_patchqueue import QueueStats
        >>> as_line(QueueStats(fill=0.5, starved=0.34, bottleneck="workers:LoadImaged"))
        'queue |████    | 50%, starved 34%, workers:LoadImaged'
    """
    return f"queue |{gauge(stats.fill)}| {stats.fill:.0%}, starved {stats.starved:.0%}, {stats.bottleneck}"


def as_html(stats: QueueStats, title: str = "") -> str:
    """The figures as an HTML table, in the colours of the page that it is put into."""
    longest = f"{1000 * stats.max_wait_seconds:.0f} ms at most"
    drawn = f"{stats.batches} batches, {stats.patches} patches of {stats.volumes_seen} volumes"
    rows = {
        "queue": f"{_meter(stats.fill)} {stats.fill:.0%} of {stats.queue_length} patches ready",
        "starved": f"{_meter(stats.starved)} {stats.starved:.0%} of the time",
        "bottleneck": escape(stats.bottleneck),
        "rate": f"{stats.patches_per_second:.1f} patches/s, {stats.volumes_per_second:.2f} volumes/s",
        "wait for a batch": f"{1000 * stats.wait_seconds:.1f} ms on average, {longest}",
        "so far": f"epoch {stats.epoch}: {drawn}",
        "workers": f"{stats.num_workers}, busy {stats.worker_busy:.0%} of the time",
    }
    slowest = sorted(stats.transform_seconds.items(), key=lambda item: -item[1])[:3]
    if slowest and slowest[0][1]:
        rows["slowest transforms"] = ", ".join(f"{escape(name)} {1000 * s:.0f} ms" for name, s in slowest)
    cells = "".join(
        f'<tr><th style="text-align:left;font-weight:normal;opacity:.65">{name}</th>'
        f'<td style="text-align:left">{value}</td></tr>'
        for name, value in rows.items()
    )
    caption = f'<caption style="text-align:left;caption-side:top">{escape(title)}</caption>' if title else ""
    return f"<table>{caption}{cells}</table>"


def _meter(share: float) -> str:
    return f'<progress max="1" value="{share:.3f}" style="width:8em"></progress>'
