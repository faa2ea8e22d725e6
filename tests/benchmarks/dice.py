# SPDX-License-Identifier: Apache-2.0
"""Train a spleen-shaped bundle with MONAI's loader and with the queue on as many patches, and compare Dice and time."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HELP = "validation Dice and time of a bundle with MONAI's loader and with the queue, side by side"

QUEUE = {"train#dataloader#_target_": "monai_patchqueue.PatchQueueLoader", "train#dataloader#batch_unit": "volume"}
# Patches from a volume at a time, in multiples of the bundle's.
_DEEPER = 4
CONTESTANTS = {
    "monai": "MONAI's `DataLoader`",
    "queue": "the flag, and `batch_unit` volume",
    "deeper": f"the same, {_DEEPER} times the patches of a volume, as many fewer epochs",
}
VOLUMES, VALIDATION = 10, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    everyone = ", ".join(f"{name} ({title})" for name, title in CONTESTANTS.items())
    add("--contestants", nargs="+", choices=[*CONTESTANTS], default=[*CONTESTANTS], metavar="NAME", help=everyone)
    add("--seeds", type=int, default=3)
    add("--epochs", type=int, default=24, help="of MONAI's loader; each volume gives four patches in one")
    add("--shape", type=int, nargs=3, default=(144, 128, 96), metavar="N")
    add("--workers", type=int, default=2)
    add("--json", type=Path, help="write every run's figures here")
    add("--one", nargs=3, metavar=("NAME", "SEED", "FOLDER"), help=argparse.SUPPRESS)


def main(arguments: argparse.Namespace) -> int:
    if arguments.one:
        name, seed, folder = arguments.one
        print(json.dumps(train(name, int(seed), Path(folder), arguments.epochs, arguments.workers)))
        return 0
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.contestants}
    with tempfile.TemporaryDirectory(prefix="patchqueue-dice-") as temporary:
        folder = Path(temporary)
        write_task(folder / "data", arguments.shape)
        for seed in range(arguments.seeds):
            for name in runs:
                runs[name].append(_in_a_process(name, seed, folder, arguments))
                print(f"seed {seed}, {name}: {runs[name][-1]}", file=sys.stderr)
    print(_table(runs))
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=1))
    return 0


def write_task(folder: Path, shape: Sequence[int]) -> None:
    """Write volumes of which the grainy organ is to be found; no intensity threshold finds it."""
    import nibabel as nib
    import numpy as np

    from monai_patchqueue.data.synthetic import synthetic_volume

    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for case in range(VOLUMES + VALIDATION):
        image, label, _, affine = synthetic_volume(shape, 0, case)
        organ = np.isin(label, (1, 3)).astype(np.uint8)  # lesions lie within it
        for part, array in (("imagesTr", image), ("labelsTr", organ)):
            nib.save(nib.Nifti1Image(array, affine), folder / part / f"case_{case:02d}.nii.gz")


def settings(name: str, seed: int, folder: Path, epochs: int, workers: int) -> dict[str, Any]:
    """The bundle's settings for a contestant."""
    common = {
        "bundle_root": str(folder),
        "num_validation": VALIDATION,
        "patch_size": [32, 32, 32],
        "learning_rate": 0.005,
        "network_def#channels": [8, 16, 32],
        "network_def#strides": [2, 2],
        "network_def#num_res_units": 0,
        "network_def#norm": "instance",
        "train#deterministic_transforms#4#a_min": 0,
        "train#deterministic_transforms#4#a_max": 1000,
        "train#dataloader#num_workers": workers,
        "validate#evaluator#val_handlers": [],
        "initialize": [f"$monai.utils.set_determinism(seed={seed})"],
    }
    if name == "monai":
        return {**common, "epochs": epochs, "val_interval": epochs}
    if name == "queue":
        return {**common, **QUEUE, "epochs": epochs, "val_interval": epochs}
    batch = 2 * 4
    fewer = max(1, epochs // _DEEPER)
    deeper = {"train#random_transforms#0#num_samples": 4 * _DEEPER, "epochs": fewer, "val_interval": fewer}
    flag = {**QUEUE, "train#dataloader#batch_unit": "patch", "train#dataloader#batch_size": batch}
    return {**common, **flag, **deeper}


def train(name: str, seed: int, folder: Path, epochs: int, workers: int) -> dict[str, float]:
    """Train once in this process; its Dice, patches, and seconds between the first and the last step."""
    import psutil
    import torch
    from ignite.engine import Events
    from monai.bundle import ConfigWorkflow

    from tests.bundles.zoo import spleen_ct

    torch.set_num_threads(1)
    file = folder / f"{name}_{seed}" / "train.json"
    file.parent.mkdir()
    file.write_text(json.dumps(spleen_ct()))
    workflow = ConfigWorkflow(str(file), logging_file=False, **settings(name, seed, folder, epochs, workers))
    workflow.initialize()
    trainer, evaluator = (workflow.parser.get_parsed_content(part) for part in ("train#trainer", "validate#evaluator"))
    trainer.logger.setLevel("WARNING")
    seen = {"patches": 0, "waited": 0.0, "validated": 0.0, "asked": 0.0}

    @trainer.on(Events.GET_BATCH_STARTED)
    def ask() -> None:
        seen["asked"] = time.perf_counter()

    @trainer.on(Events.GET_BATCH_COMPLETED)
    def get() -> None:
        seen["waited"] += time.perf_counter() - seen["asked"]
        seen["patches"] += len(trainer.state.batch["image"])

    @evaluator.on(Events.STARTED)
    def begin() -> None:
        seen["validated"] -= time.perf_counter()

    @evaluator.on(Events.COMPLETED)
    def end() -> None:
        seen["validated"] += time.perf_counter()

    start, cpu = time.perf_counter(), psutil.Process().cpu_times()
    workflow.run()
    seconds = time.perf_counter() - start - seen["validated"]
    workflow.finalize()
    own = sum(psutil.Process().cpu_times()[:2]) - sum(cpu[:2])
    return {
        "dice": evaluator.state.metrics["val_mean_dice"],
        "patches": seen["patches"],
        "seconds": seconds,
        "waited": seen["waited"],
        "cpu": own,
    }


def _in_a_process(name: str, seed: int, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks", "dice", "--one", name, str(seed), str(folder)]
    command += ["--epochs", str(arguments.epochs), "--workers", str(arguments.workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}, seed {seed}: {done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _table(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    columns = ["", "patches", "Dice: mean (each seed)", "seconds", "of them waiting", "CPU seconds", "time, as a ratio"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    baseline = next(iter(runs.values()))
    for name, results in runs.items():
        dice, seconds, waited, cpu = ([run[key] for run in results] for key in ("dice", "seconds", "waited", "cpu"))
        ratios = [run["seconds"] / first["seconds"] for run, first in zip(results, baseline, strict=True)]
        cells = [
            CONTESTANTS[name],
            str(results[0]["patches"]),
            f"{statistics.mean(dice):.3f} ({', '.join(f'{value:.3f}' for value in dice)})",
            f"{statistics.median(seconds):.0f} ({min(seconds):.0f} to {max(seconds):.0f})",
            f"{statistics.median(waited):.0f}",
            f"{statistics.median(cpu):.0f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
