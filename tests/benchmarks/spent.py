# SPDX-License-Identifier: Apache-2.0
"""Where the processor time of a patch goes: what the least work takes, what reading a batch takes, and the rest."""

from __future__ import annotations

from statistics import median

from .bars import Results
from .cases import CASES
from .contestants import CONTESTANTS
from .report import figure_of, markdown

ROWS = (
    ("gz", "patchqueue-reader", "limit-decode"),
    ("gz-large", "patchqueue-reader", "limit-decode"),
    ("prepared", "patchqueue-reader", "limit-memmap"),
    ("prepared", "patchqueue-store", "limit-memmap"),
    ("prepared-large", "patchqueue-store", "limit-memmap"),
    ("ram-0", "patchqueue-cache-index", "limit-copy"),
    ("ram", "patchqueue-cache-index", "limit-copy"),
)
READING = ("ram", "limit-ram")
"""Gathering a batch of 64³ and reading it, which any loader's consumer does."""


def spent_table(results: Results) -> str:
    """Milliseconds of processor time a patch; empty where the cost of reading was not measured."""
    reading = _cpu(results, *READING)
    rows = []
    for case, ours, limit in ROWS:
        total, least = _cpu(results, case, ours), _cpu(results, case, limit)
        if total is not None and least is not None and reading is not None:
            rest = total - least - reading
            title = f"{CONTESTANTS[ours].title}: {CASES[case].title}"
            rows.append([title, f"{total:.2f}", f"{least:.2f}", f"{reading:.2f}", f"{rest:.2f} ({rest / total:.0%})"])
    head = ["processor ms a patch", "all", "the limit's work", "gathering and reading", "the rest"]
    return markdown(head, rows) if rows else ""


def _cpu(results: Results, case: str, name: str) -> float | None:
    runs = results.runs.get(case, {}).get(name)
    return median(figure_of(run, "free.cpu_ms_per_patch") for run in runs) if runs else None
