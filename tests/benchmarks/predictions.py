# SPDX-License-Identifier: Apache-2.0
"""Compare what the profiler predicts for other settings with what a loader then gives."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from monai.data import Dataset, load_decathlon_datalist
from monai.transforms import Compose, LoadImaged, NormalizeIntensityd, RandFlipd, RandGaussianNoised
from tqdm import tqdm

from monai_patchqueue import PatchQueueLoader, RandLabelPatchd
from monai_patchqueue.report.bundle_loader import as_queue_loader
from monai_patchqueue.report.model import deliverable
from monai_patchqueue.report.profiler import num_samples_set_to, profile_pipeline

from .harness import wait_for_quiet
from .measure import all_cpu_seconds, cpu_seconds
from .report import environment
from .volumes import write_volumes

HELP = "patches per second as the profiler predicts them, and as they are"

KEYS = ["image", "label"]
PATIENCE = 60.0  # seconds to wait for a quiet machine


@dataclass(frozen=True)
class Setting:
    """What is changed; a loader has 2 workers, 8 samples per volume and a queue of 48 patches otherwise."""

    num_workers: int = 2
    samples_per_volume: int = 8
    step: float = 0.0
    queue_length: int = 48
    repeats: int = 1

    @property
    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "step"}


# Of these, the profiler runs the first, the fourth and the second itself, but at another time.
SETTINGS = (
    Setting(1),
    Setting(2),
    Setting(0),
    Setting(1, samples_per_volume=16),
    Setting(2, samples_per_volume=16),
    Setting(2, samples_per_volume=3),
    Setting(4),
    Setting(2, repeats=2),
    Setting(1, queue_length=16, step=0.04),
    Setting(2, samples_per_volume=16, step=0.04),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, help="a data set as the Medical Segmentation Decathlon's (default: synthetic volumes)")
    add("--volumes", type=int, default=12, help="synthetic ones")
    add("--shape", type=int, nargs=3, default=(192, 192, 160), metavar="N", help="of the synthetic ones")
    add("--patch-size", type=int, default=64)
    add("--seconds", type=float, default=5.0, help="length of each run")
    add("--rounds", type=int, default=3)
    add(
        "--max-others",
        type=float,
        default=float("inf"),
        metavar="CORES",
        help="as for loaders",
    )
    add("--json", type=Path, help="write every run's figures here")


def main(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="patchqueue-volumes-") as temporary:
        if arguments.data is None:
            items: Sequence[Any] = write_volumes(Path(temporary), arguments.volumes, arguments.shape)
        else:
            items = load_decathlon_datalist(os.fspath(arguments.data / "dataset.json"))
        rounds = [_round(_loader(items, arguments.patch_size), arguments, number) for number in range(arguments.rounds)]
    print(table(rounds))
    others = [run["others"] for runs in rounds for run in runs]
    busy = f"{statistics.median(others):.1f} (at most {max(others):.1f}) of {environment()['cpus']} cores"
    print(f"\nMedians of {len(rounds)} rounds, in brackets extremes. Other programs kept {busy} busy meanwhile.")
    if arguments.json:
        arguments.json.write_text(json.dumps(rounds, indent=1))
    return 0


def _loader(items: Sequence[Any], patch_size: int) -> PatchQueueLoader:
    transforms = [
        LoadImaged(KEYS, ensure_channel_first=True),
        NormalizeIntensityd("image"),
        RandLabelPatchd(KEYS, "label", patch_size, num_samples=8, label_probabilities={0: 1, 1: 1, 2: 1, 3: 1}),
        RandFlipd(KEYS, 0.5, spatial_axis=0),
        RandGaussianNoised("image", prob=0.5),
    ]
    keep = [{key: item[key] for key in KEYS} for item in items]
    dataset = Dataset(keep * 50, Compose(transforms))
    return PatchQueueLoader(dataset, 2, batch_size=4, shuffle=True, queue_length=48, batch_unit="patch", seed=0)


def _round(loader: PatchQueueLoader, arguments: argparse.Namespace, number: int) -> list[dict[str, Any]]:
    """Profile, then run each setting: prediction and truth of a round are of the same few minutes."""
    wait_for_quiet(arguments.max_others, PATIENCE)
    profile = profile_pipeline(loader, arguments.seconds)
    runs = []
    for setting in tqdm(SETTINGS, desc=f"round {number + 1} of {arguments.rounds}", unit="setting", leave=False):
        changed = replace(profile.settings, **setting.arguments)
        predicted = deliverable(replace(profile.times, step=setting.step), changed)
        wait_for_quiet(arguments.max_others, PATIENCE)
        measured, others = _measure(loader, setting, arguments.seconds)
        runs.append({**asdict(setting), "predicted": predicted, "measured": measured, "others": others})
    return runs


def _measure(loader: PatchQueueLoader, setting: Setting, seconds: float) -> tuple[float, float]:
    """Patches per second that a consumer gets, and the processors that other programs keep busy meanwhile.

    The clock starts when the queue's window, full from the start, has been drawn once; no epoch ends before it stops.
    """
    arguments = setting.arguments
    samples = arguments.pop("samples_per_volume")
    with (
        num_samples_set_to(loader.dataset, samples),
        as_queue_loader(loader, seed=0, warmup=setting.queue_length, **arguments) as queue,
    ):
        batches = chain.from_iterable(repeat(queue))
        for _ in range(-(-setting.queue_length * setting.repeats // loader.batch_size)):
            next(batches)
            time.sleep(setting.step)
        patches, start, busy, own = 0, time.perf_counter(), all_cpu_seconds(), cpu_seconds()
        while time.perf_counter() < start + seconds:
            patches += len(next(batches)["image"])
            time.sleep(setting.step)
        wall = time.perf_counter() - start
        others = all_cpu_seconds() - busy - (cpu_seconds() - own)
    return patches / wall, max(others, 0.0) / wall


def table(rounds: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Medians over rounds, in Markdown."""
    lines = [
        "| workers | samples | queue | repeats | step | predicted | measured | predicted / measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for runs in zip(*rounds, strict=True):
        predicted, measured = (statistics.median(run[name] for run in runs) for name in ("predicted", "measured"))
        ratios = sorted(run["predicted"] / run["measured"] for run in runs)
        step = f"{1000 * runs[0]['step']:.0f} ms" if runs[0]["step"] else "–"
        cells = [runs[0][name] for name in ("num_workers", "samples_per_volume", "queue_length", "repeats")]
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f})"
        lines.append(f"| {' | '.join(map(str, cells))} | {step} | {predicted:.0f} | {measured:.0f} | {ratio} |")
    return "\n".join(lines)
