# SPDX-License-Identifier: Apache-2.0
"""Medians and ratios of several runs as a Markdown table."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

from .contestants import CONTESTANTS, Contestant

Run = Mapping[str, Any]
COLUMNS = (
    "",
    "patches/s (min to max)",
    "{baseline} is",
    "CPU ms a patch",
    "stalled (min to max)",
    "wait p50 / p99 / max ms",
    "first batch s",
    "peak PSS MiB",
    "volumes a step",
    "exact epochs",
)


def table(runs: Mapping[str, Sequence[Run]], checks: Mapping[str, Run], baseline: str) -> str:
    """One row per contestant. Ratios are taken within a round, then their median: rounds may differ, contestants in a
    round hardly do.
    """
    title = CONTESTANTS[baseline].title
    rows = [[column.format(baseline=title) for column in COLUMNS], ["---"] * len(COLUMNS)]
    rows += [_row(CONTESTANTS[name], runs[name], checks[name], runs[baseline]) for name in runs]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(contestant: Contestant, runs: Sequence[Run], check: Run, baseline: Sequence[Run]) -> list[str]:
    free = [run["free"] for run in runs]
    paced = [run["paced"] for run in runs]
    mixed = [run["volumes_per_step"] for run in paced if run["volumes_per_step"] is not None]
    ratios = [
        ours["free"]["patches_per_s"] / theirs["patches_per_s"] for ours, theirs in zip(baseline, free, strict=True)
    ]
    waits = [f"{median(run[f'wait_{which}_ms'] for run in paced):.0f}" for which in ("p50", "p99", "max")]
    return [
        contestant.title,
        _spread([run["patches_per_s"] for run in free], "{:.0f}".format),
        f"{median(ratios):.2f} x",
        f"{median(run['cpu_ms_per_patch'] for run in free):.1f}",
        _spread([run["stalled"] for run in paced], "{:.0%}".format),
        " / ".join(waits),
        f"{median(run['first_batch_s'] for run in runs):.2f}",
        f"{median(run['peak_pss_mib'] for run in runs):.0f}",
        f"{median(mixed):.1f}" if mixed else "",
        ("yes" if check["exact_epoch"] else "no") if check else "",
    ]


def _spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    if len(values) == 1:
        return text(values[0])
    return f"{text(median(values))} ({text(min(values))} to {text(max(values))})"


def environment() -> dict[str, Any]:
    """What has to be known to read the figures."""
    versions = {}
    for package in ("monai_patchqueue", "monai", "torch", "torchio", "nibabel", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
    }


def others_note(runs: Mapping[str, Sequence[Run]]) -> str:
    """What else the machine did meanwhile: figures taken beside other work are worth less."""
    every_run = [run for contestant in runs.values() for run in contestant]
    others = [run[mode]["others_cores"] for run in every_run for mode in ("free", "paced")]
    busiest = f"{median(others):.2f} (at most {max(others):.2f})"
    return f"Other processes kept {busiest} of {environment()['cpus']} cores busy while timing."
