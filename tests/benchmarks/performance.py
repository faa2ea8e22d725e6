# SPDX-License-Identifier: Apache-2.0
"""Run all cases of the documentation's page on performance, and write its tables and plots.

Runs that are done are kept in a folder: an interrupted benchmark goes on where it ended.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from .cases import CASES, Case
from .contestants import CONTESTANTS
from .harness import ROOT, ContestantFailed, check_all, time_one
from .kept_runs import KeptRuns
from .performance_page import write_page
from .registry import Contestant

HELP = "all cases of docs/performance.md: resumable, about half an hour"
SAMPLING = "sampling"
TIMEOUT = 240.0  # seconds for one run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="volumes, stores and finished runs are kept here")
    add("--only", nargs="+", choices=[*CASES, SAMPLING], metavar="CASE", help=f"of {', '.join([*CASES, SAMPLING])}")
    add("--rounds", type=int, help="fresh processes of each contestant (default: 1 to 3, by case)")
    add("--budget-minutes", type=float, default=float("inf"), help="start no run after that time")
    add("--max-others", type=float, metavar="CORES", help="repeat a run while other processes used more than this")
    add("--prepare", action="store_true", help="write volumes and stores and check what is delivered; time nothing")
    add(
        "--docs",
        type=Path,
        metavar="FOLDER",
        help="write tables and plots of all finished runs into performance.md here",
    )
    add("--page-only", action="store_true", help="run nothing, write the page")


def main(arguments: argparse.Namespace) -> int:
    chosen = arguments.only or [*CASES, SAMPLING]
    until = time.monotonic() + 60 * arguments.budget_minutes
    failures: list[str] = []
    if not arguments.page_only:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by an exception, which ends the run's processes too
        kept = {name: _kept(arguments.folder, CASES[name]) for name in chosen if name != SAMPLING}
        failures += _check(arguments.folder, kept)
        if SAMPLING in chosen and not arguments.prepare:
            failures += _run_sampling(arguments.folder)
        if not arguments.prepare:
            failures += _time(arguments, kept, until)
    if arguments.docs:
        kept = {name: _kept(arguments.folder, case) for name, case in CASES.items()}
        write_page(arguments.docs, kept, _file(arguments.folder, SAMPLING))
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def _check(folder: Path, kept: Mapping[str, KeptRuns]) -> Iterator[str]:
    """Write volumes and stores and compare what is delivered, where that was not done; gives what failed."""
    for name, of_case in tqdm(kept.items(), desc="preparing and checking", unit="case", leave=False):
        if of_case.require_current():
            print(f"{name}: what was kept is of other sources or another setting, and is dropped", file=sys.stderr)
        setup = CASES[name].setup(folder / "volumes")
        unchecked = [contestant for contestant in _contestants(CASES[name]) if contestant.name not in of_case.checks]
        try:
            of_case.keep_checks(check_all(unchecked, setup) if unchecked else {})
        except ContestantFailed as failure:
            yield f"{name}: {failure}"


def _time(arguments: argparse.Namespace, kept: Mapping[str, KeptRuns], until: float) -> Iterator[str]:
    """Time what was checked; gives what failed. The first round of every case comes before the second of any."""
    todo = [
        (CASES[name], contestant, round_)
        for round_ in range(arguments.rounds or max((CASES[name].rounds for name in kept), default=0))
        for name, of_case in kept.items()
        if round_ < (arguments.rounds or CASES[name].rounds)
        for contestant in _contestants(CASES[name])
        if contestant.name in of_case.checks and not of_case.has(contestant.name, round_)
    ]
    progress = tqdm(todo, desc="timing", unit="run", leave=False)
    for case, contestant, round_ in progress:
        if time.monotonic() > until:
            yield f"{len(todo) - progress.n} of {len(todo)} runs were not started within the budget: run this again"
            break
        progress.set_postfix_str(f"{case.name} {contestant.name}")
        try:
            setup = case.setup(arguments.folder / "volumes")
            if contestant.is_limit:
                setup = replace(setup, paced=False)
            run = time_one(contestant, setup, arguments.max_others, attempts=3, timeout=TIMEOUT)
        except ContestantFailed as failure:
            yield f"{case.name}: {failure}"
        else:
            kept[case.name].keep(contestant.name, round_, run)


def _run_sampling(folder: Path) -> Iterator[str]:
    """In a process of its own, as all else."""
    command = [sys.executable, "-m", "tests.benchmarks", "sampling", "--json", str(_file(folder, SAMPLING))]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    if ended.returncode:
        yield f"sampling ended with status {ended.returncode}"


def _kept(folder: Path, case: Case) -> KeptRuns:
    return KeptRuns(_file(folder, case.name), case.setting)


def _contestants(case: Case) -> list[Contestant]:
    return [CONTESTANTS[name] for name in case.contestants if not CONTESTANTS[name].missing]


def _file(folder: Path, name: str) -> Path:
    return folder / "runs" / f"{name}.json"
