# SPDX-License-Identifier: Apache-2.0
"""Fills the tables and plots of the documentation's page on performance."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from .bars import Results, bars_table
from .cases import CASES
from .kept_runs import KeptRuns
from .performance_plots import plots
from .report import others_note, table
from .sampling import table as sampling_table
from .sampling_contestants import MAPS
from .spent import spent_table

PAGE = "performance.md"
PLOTS = {
    "throughput": "Patches per second of each contestant in six settings, and the limits.",
    "paced": "Share of time stalled, waits and memory with a consumer that takes 50 ms a batch.",
    "sampling": "Milliseconds to choose and cut eight patches.",
}


def write_page(docs: Path, kept: Mapping[str, KeptRuns], sampling_file: Path) -> None:
    """Put what was measured into ``performance.md``, and plots into ``_static`` beside it.

    What was not measured stays as it is on the page.
    """
    sampling = json.loads(sampling_file.read_text()) if sampling_file.exists() else {"results": []}
    runs = {name: of_case.runs() for name, of_case in kept.items() if of_case.runs()}
    results = Results(runs, sampling["results"])
    regions = {"bars": bars_table(results)}
    if spent := spent_table(results):
        regions["spent"] = spent
    environments = [of_case.content["environment"] for of_case in kept.values() if of_case.content]
    if environments:
        regions["machine"] = machine(environments[-1])
    for name, of_case in runs.items():
        note = f"{conditions(name, of_case)} {others_note(of_case)}"
        regions[name] = f"{table(of_case, kept[name].checks, next(iter(of_case)))}\n\n{note}"
    for kind in MAPS:
        of_kind = [result for result in results.sampling if result["scene"]["kind"] == kind]
        if of_kind:
            regions[f"sampling-{kind}"] = sampling_table(of_kind)
    for name, png in plots(results).items():
        (docs / "_static" / f"performance_{name}.png").write_bytes(png)
        regions[f"plot-{name}"] = f"![{PLOTS[name]}](_static/performance_{name}.png)"
    page = docs / PAGE
    page.write_text(fill(page.read_text(encoding="utf-8"), regions), encoding="utf-8")


def fill(page: str, regions: Mapping[str, str]) -> str:
    """Replace what is between ``<!-- measured: name -->`` and ``<!-- end -->`` for each name.

    Raises:
        ValueError: a region is not on the page.
    """
    for name, text in regions.items():
        region = re.compile(rf"(<!-- measured: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not region.search(page):
            raise ValueError(f"the page has no region {name!r}: add <!-- measured: {name} --> and <!-- end -->")
        page = region.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
    return page


def conditions(name: str, runs: Mapping[str, Any]) -> str:
    """How a case was run, beneath its table."""
    case = CASES[name]
    epochs = median(run["free"]["epochs"] for of_contestant in runs.values() for run in of_contestant)
    rounds = len(next(iter(runs.values())))
    return (
        f"{case.volumes} volumes, batches of 4. Medians of {rounds} fresh processes each; epochs for "
        f"{case.seconds:.0f} s or more (a median of {epochs:.0f})."
    )


def machine(environment: Mapping[str, Any]) -> str:
    """What all was measured on, and the versions of all."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return (
        f"{environment['processor']}, {environment['cpus']} cores of a virtual machine, {environment['memory_gib']} "
        f"GiB of memory, no GPU. {environment['system']}, Python {environment['python']}, {versions}."
    )
