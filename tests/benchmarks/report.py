# SPDX-License-Identifier: Apache-2.0
"""Medians and ratios of several runs as a Markdown table."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from .contestants import CONTESTANTS

Run = Mapping[str, Any]
PACKAGES = (
    "monai_patchqueue",
    "monai",
    "torch",
    "torchio",
    "nnunetv2",
    "batchgenerators",
    "nibabel",
    "numpy",
    "isal",
    "blosc2",
)


def table(runs: Mapping[str, Sequence[Run]], checks: Mapping[str, Run], baseline: str) -> str:
    """One row per contestant. Ratios are taken within a round, then their median: rounds may differ, contestants in a
    round hardly do. Figures of the consumer that sleeps are left out where there was none.
    """
    paced = any("paced" in run for of_contestant in runs.values() for run in of_contestant)
    head = ["", "patches/s (min to max)", f"{CONTESTANTS[baseline].title} is", "CPU ms a patch"]
    head += ["stalled (min to max)", "wait p50 / p99 / max ms"] if paced else []
    head += ["first batch s", "peak PSS MiB", "volumes a step", "exact epochs"]
    rows = []
    for name, of_contestant in runs.items():
        free = [run["free"] for run in of_contestant]
        row = [
            CONTESTANTS[name].title,
            _spread([run["patches_per_s"] for run in free], "{:.0f}".format),
            f"{median(ratios(runs[baseline], of_contestant)):.2f} x",
            f"{median(run['cpu_ms_per_patch'] for run in free):.1f}",
            *(_paced_cells([run["paced"] for run in of_contestant if "paced" in run]) if paced else ()),
            f"{median(run['first_batch_s'] for run in of_contestant):.2f}",
            f"{median(run['peak_pss_mib'] for run in of_contestant):.0f}",
        ]
        mixed = [run["volumes_per_step"] for run in free if run["volumes_per_step"] is not None]
        check = checks[name]
        row += [f"{median(mixed):.1f}" if mixed else "", ("yes" if check["exact_epoch"] else "no") if check else ""]
        rows.append(row)
    return markdown(head, rows)


def ratios(runs: Sequence[Run], others: Sequence[Run], figure: str = "free.patches_per_s") -> list[float]:
    """How many times the others' figure is reached, in each round."""
    return [figure_of(a, figure) / figure_of(b, figure) for a, b in zip(runs, others, strict=True)]


def figure_of(run: Run, figure: str) -> float:
    """A figure of a run by its path, such as ``free.patches_per_s``."""
    found: Any = run
    for key in figure.split("."):
        found = found[key]
    return float(found)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _paced_cells(paced: Sequence[Run]) -> tuple[str, str]:
    if not paced:
        return "", ""
    waits = [f"{median(run[f'wait_{which}_ms'] for run in paced):.0f}" for which in ("p50", "p99", "max")]
    return _spread([run["stalled"] for run in paced], "{:.1%}".format), " / ".join(waits)


def _spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    if len(values) == 1:
        return text(values[0])
    return f"{text(median(values))} ({text(min(values))} to {text(max(values))})"


def environment() -> dict[str, Any]:
    """What has to be known to read the figures."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "versions": versions,
    }


def _processor() -> str:
    """The processor's name, with family and model where Linux tells them: names in virtual machines say little."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    name = known.get("model name", platform.machine())
    return f"{name} (family {known['cpu family']}, model {known['model']})" if "cpu family" in known else name


def others_note(runs: Mapping[str, Sequence[Run]]) -> str:
    """What else the machine did meanwhile: figures taken beside other work are worth less."""
    every_run = [run for contestant in runs.values() for run in contestant]
    others = [run[mode]["others_cores"] for run in every_run for mode in ("free", "paced") if mode in run]
    busiest = f"{median(others):.2f} (at most {max(others):.2f})"
    return f"Other processes kept {busiest} of {environment()['cpus']} cores busy while timing."
