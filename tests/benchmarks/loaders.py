# SPDX-License-Identifier: Apache-2.0
"""Time PatchQueueLoader beside TorchIO's Queue and MONAI's loaders on the same volumes."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .contestants import CONTESTANTS, DEFAULT, QUICK, Contestant
from .harness import ContestantFailed, check_all, time_all
from .report import environment, others_note, table
from .setup import Setup
from .volumes import write_volumes

HELP = "patches per second, time stalled and memory of patch loaders, side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    everyone = ", ".join(f"{name} ({contestant.title})" for name, contestant in CONTESTANTS.items())
    add = parser.add_argument
    add("--contestants", nargs="+", choices=[*CONTESTANTS], metavar="NAME", help=everyone)
    add("--baseline", help="whose multiple the ratios are (default: the first contestant)")
    add("--volumes", type=int, default=12)
    add("--shape", type=int, nargs=3, default=(192, 192, 160), metavar="N")
    add("--suffix", default=".nii.gz", choices=[".nii.gz", ".nii"])
    add("--patch-size", type=int, default=64)
    add("--samples-per-volume", type=int, default=8)
    add("--queue-length", type=int, default=48, help="in patches")
    add("--batch-size", type=int, default=4, help="in patches")
    add("--workers", type=int, default=2)
    add("--epochs", type=int, help="measured, after one that is not (default: 4)")
    add("--repeats", type=int, help="fresh processes per contestant (default: 3)")
    add("--sleep", type=float, default=0.05, help="seconds that the second consumer takes for a step")
    add("--max-others", type=float, metavar="CORES", help="repeat a run while other processes used more than this")
    add("--quick", action="store_true", help="one process each and one epoch: a look, not a measurement")
    add("--check-only", action="store_true", help="compare what is delivered, time nothing")
    add("--folder", type=Path, help="keep the volumes here, and take those that are there")
    add("--json", type=Path, help="write every run's figures here")


def main(arguments: argparse.Namespace) -> int:
    names = arguments.contestants or (QUICK if arguments.quick else DEFAULT)
    contestants = _installed([CONTESTANTS[name] for name in dict.fromkeys(names)])
    taking_part = [contestant.name for contestant in contestants]
    baseline = arguments.baseline or next(iter(taking_part), "nobody")
    if baseline not in taking_part:
        print(f"The ratios are multiples of {baseline!r}, who is not among {taking_part}.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="patchqueue-volumes-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        setup = Setup(
            items=write_volumes(folder, arguments.volumes, arguments.shape, arguments.suffix),
            patch_size=arguments.patch_size,
            samples_per_volume=arguments.samples_per_volume,
            queue_length=arguments.queue_length,
            batch_size=arguments.batch_size,
            num_workers=arguments.workers,
            epochs=arguments.epochs or (1 if arguments.quick else 4),
            sleep=arguments.sleep,
        )
        repeats = arguments.repeats or (1 if arguments.quick else 3)
        try:
            checks = check_all(contestants, setup)
            print(_checked(checks))
            runs = {} if arguments.check_only else time_all(contestants, setup, repeats, arguments.max_others)
        except ContestantFailed as failure:
            print(failure, file=sys.stderr)
            return 1
    if runs:
        shape = "x".join(str(size) for size in arguments.shape)
        print(f"\n{_conditions(setup, shape + arguments.suffix, repeats)}\n\n{table(runs, checks, baseline)}")
        print(f"\n{others_note(runs)}")
    if arguments.json:
        everything = {"setup": asdict(setup), "environment": environment(), "checks": checks, "runs": runs}
        arguments.json.write_text(json.dumps(everything, indent=1))
    return 0


def _installed(contestants: Sequence[Contestant]) -> list[Contestant]:
    for contestant in contestants:
        if contestant.missing:
            remedy = f": pip install {contestant.remedy}" if contestant.remedy else ""
            message = f"{contestant.title} is left out, {contestant.requires} is not installed{remedy}"
            print(message, file=sys.stderr)
    return [contestant for contestant in contestants if not contestant.missing]


def _checked(checks: Mapping[str, Mapping[str, Any]]) -> str:
    counts = ", ".join(f"{name} {check['patches']}" for name, check in checks.items() if check)
    return f"Patches whose voxels, dtype and affine were found to be the stock pipeline's: {counts or 'none compared'}."


def _conditions(setup: Setup, volumes: str, repeats: int) -> str:
    return (
        f"{len(setup.items)} volumes {volumes} (int16, uint8 label; page cache warm), {setup.samples_per_volume} "
        f"patches of {setup.patch_size}^3 a volume by label, queue {setup.queue_length}, batch {setup.batch_size}, "
        f"{setup.num_workers} workers. Medians (min to max) of {repeats} fresh processes, {setup.epochs} epochs each. "
        f"Stalled, waits: the consumer sleeps {1000 * setup.sleep:.0f} ms a step; the other figures: it doesn't."
    )
