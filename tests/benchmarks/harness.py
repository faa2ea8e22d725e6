# SPDX-License-Identifier: Apache-2.0
"""Runs contestants in fresh processes, in turn, and watches their memory from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from .registry import Contestant
from .setup import Setup

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


class ContestantFailed(RuntimeError):
    """A contestant's process ended with an error; the message holds the end of what it wrote to stderr."""


class PeakMemory(threading.Thread):
    """Samples the proportional set size of a process and all its descendants: memory that they share counts once.

    The kernel goes through all their pages for that. So pauses are 25 times as long as sampling took, if that is more
    than ``interval``: it may take 4 % of a core from what is measured.
    """

    def __init__(self, pid: int, interval: float = 0.25) -> None:
        super().__init__(daemon=True)
        self.root = psutil.Process(pid)
        self.interval = interval
        self.peak = 0
        self._ended = threading.Event()

    def run(self) -> None:
        pause = self.interval
        while not self._ended.wait(pause):
            started = time.thread_time()
            self.peak = max(self.peak, self._sample())
            pause = max(self.interval, 25 * (time.thread_time() - started))

    def stop(self) -> float:
        """End sampling and give the peak in MiB."""
        self._ended.set()
        self.join()
        return self.peak / MIB

    def _sample(self) -> int:
        total = 0
        try:
            processes = [self.root, *self.root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        for process in processes:
            try:
                info = process.memory_full_info()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            total += getattr(info, "pss", info.uss)  # only Linux has the proportional size
        return total


def run(contestants: Sequence[Contestant], mode: str, setup: Setup, timeout: float = 900.0) -> dict[str, Any]:
    """Run `mode` ("check" or "time") for one or more contestants in a fresh process.

    Returns:
        What the process measured for each, and the peak memory of its process tree.

    Raises:
        ContestantFailed: it ended with an error, or not within `timeout` seconds.
    """
    names = [contestant.name for contestant in contestants]
    request = json.dumps({"contestants": names, "mode": mode, "setup": setup.to_json()})
    with tempfile.TemporaryDirectory(prefix="patchqueue-benchmark-") as folder:
        result, log = Path(folder, "result.json"), Path(folder, "stderr.txt")
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.benchmarks.measure", str(result)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,  # so that its workers can be ended with it
                text=True,
            )
            memory = PeakMemory(process.pid)
            memory.start()
            try:
                process.communicate(request, timeout=timeout)
            except subprocess.TimeoutExpired as error:
                raise ContestantFailed(f"{', '.join(names)} ({mode}) ran for more than {timeout:.0f} s") from error
            finally:
                peak = memory.stop()
                _end_group(process)
        if process.returncode != 0 or not result.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-60:])
            raise ContestantFailed(f"{', '.join(names)} ({mode}) ended with status {process.returncode}:\n{tail}")
        measured = json.loads(result.read_text())
    return {"measured": measured, "peak_pss_mib": peak}


def check_all(contestants: Sequence[Contestant], setup: Setup) -> dict[str, dict[str, Any]]:
    """Compare what each contestant delivers with the stock pipeline, all in one process."""
    with tqdm(total=1, desc="checking what is delivered", leave=False) as progress:
        checks: dict[str, dict[str, Any]] = run(contestants, "check", setup)["measured"]
        progress.update()
    return checks


def time_all(
    contestants: Sequence[Contestant], setup: Setup, repeats: int, max_others: float | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Time A B C, A B C, …: a drift of the machine meets all of them alike.

    Args:
        contestants: who.
        setup: on what.
        repeats: number of rounds.
        max_others: repeat a run during which other processes kept more cores than this busy; see :func:`time_one`.
    """
    runs: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in contestants}
    rounds = [contestant for _ in range(repeats) for contestant in contestants]
    progress = tqdm(rounds, desc="timing", unit="run", leave=False)
    for contestant in progress:
        progress.set_postfix_str(contestant.name)
        runs[contestant.name].append(time_one(contestant, setup, max_others))
    return runs


def time_one(
    contestant: Contestant,
    setup: Setup,
    max_others: float | None = None,
    attempts: int = 5,
    patience: float = 120.0,
    timeout: float = 900.0,
) -> dict[str, Any]:
    """Time one contestant once.

    With ``max_others`` given, it starts when other processes keep at most so many cores busy (after ``patience``
    seconds all the same), and is timed again, up to ``attempts`` times, if they took more than that during the run.
    The least disturbed run counts.
    """
    tried = []
    for _ in range(attempts if max_others is not None else 1):
        if max_others is not None:
            wait_for_quiet(max_others, patience)
        result = run([contestant], "time", setup, timeout)
        tried.append({**result["measured"][contestant.name], "peak_pss_mib": result["peak_pss_mib"]})
        if max_others is None or _disturbance(tried[-1]) <= max_others:
            break
    return min(tried, key=_disturbance)


def _disturbance(figures: Mapping[str, Any]) -> float:
    return max(figures[mode]["others_cores"] for mode in ("free", "paced") if mode in figures)


def wait_for_quiet(cores: float, patience: float) -> None:
    """Wait until programs keep at most so many cores busy, but no longer than ``patience`` seconds."""
    until = time.monotonic() + patience
    while psutil.cpu_percent(interval=2.0) / 100 * (psutil.cpu_count() or 1) > cores and time.monotonic() < until:
        pass


def _end_group(process: subprocess.Popen[str]) -> None:
    """End whatever the contestant left behind, itself included."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
