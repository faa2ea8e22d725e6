# SPDX-License-Identifier: Apache-2.0
"""Time choosing and cutting the patches of a volume in RAM, by our transforms, TorchIO's samplers and MONAI's crops."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from .check import require
from .kept_runs import package_state
from .report import environment
from .sampling_contestants import MAPS, Item, Scene, delivered, make_item, needed_of, ways
from .setup import CLASS_PROBABILITIES

HELP = "milliseconds to choose and cut 8 patches of a volume in RAM, side by side"
SHAPES = ((192, 192, 160), (512, 512, 300))
SMALL = (48, 44, 40)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", type=int, nargs=3, action="append", metavar="N", help="may be repeated (default: both sizes)")
    add("--patch-size", type=int, nargs="+", default=[64, 96])
    add("--kind", nargs="+", choices=[*MAPS], default=[*MAPS])
    add("--rounds", type=int, default=5, help="each way once a round, in turn")
    add("--json", type=Path, help="write all times here; what is there is not timed again")


def main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    for kind in arguments.kind:
        check(Scene(SMALL, 16, kind))
    shapes = [tuple(shape) for shape in arguments.shape or SHAPES]
    scenes = [Scene(shape, size, kind) for shape in shapes for size in arguments.patch_size for kind in arguments.kind]
    results = _read(arguments.json)
    todo = [scene for scene in scenes if not any(_is_of(result, scene) for result in results)]
    item, made = None, None
    for scene in tqdm(todo, desc="sampling", unit="scene", leave=False):
        if made != scene.shape:
            item, made = make_item(scene.shape), scene.shape
        assert item is not None
        results.append({"scene": asdict(scene), **time_scene(item, scene, arguments.rounds)})
        if arguments.json:
            kept = {"environment": environment(), "package": package_state(), "results": results}
            unfinished = arguments.json.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(kept, indent=1))
            unfinished.replace(arguments.json)
    for kind in arguments.kind:
        print(f"\n{table([result for result in results if result['scene']['kind'] == kind])}")
    return 0


def time_scene(item: Item, scene: Scene, rounds: int) -> dict[str, Any]:
    """The ways' ``titles`` and their times in ``ms``, in turn (A B C A B C …), after one round that is not counted."""
    everyone = ways(item, scene)
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for _ in range(rounds + 1):
        for name, way in everyone.items():
            given = way.prepare()
            started = time.perf_counter()
            patches = way.run(given)
            times[name].append(1000 * (time.perf_counter() - started))
            del patches, given
    return {
        "titles": {name: way.title for name, way in everyone.items()},
        "ms": {name: of_way[1:] for name, of_way in times.items()},
    }


def check(scene: Scene) -> None:
    """Compare every patch of each way with the volume, of which each voxel has a value of its own.

    Raises:
        AssertionError: a patch is not what lies at its place, or its center has no weight.
    """
    item = make_item(scene.shape)
    volume = torch.arange(item["image"].numel(), dtype=torch.float32).reshape(item["image"].shape)
    item["image"] = volume
    needed = needed_of(item, scene)
    for name, way in ways(item, scene).items():
        if name == "limit-map":
            continue
        patches = [*delivered(name, way.run(way.prepare()))]
        require(len(patches) == scene.num_samples, f"{name} gave {len(patches)} patches, not {scene.num_samples}")
        for patch in patches:
            where = torch.nonzero(volume[0] == patch["image"][(0, 0, 0, 0)])[0].tolist()
            window = (slice(None), *[slice(start, start + scene.patch_size) for start in where])
            for key, found in patch.items():
                require(
                    torch.equal(found, needed[key][window]), f"{name}: {key} patch at {where} differs from the volume"
                )
            center = tuple(start + scene.patch_size // 2 for start in where)
            inside = all(0 < a < n - scene.patch_size for a, n in zip(where, scene.shape, strict=True))
            weighted = scene.kind == "weighted"
            wanted = (
                needed["weights"][0][center] if weighted else int(needed["label"][0][center]) in CLASS_PROBABILITIES
            )
            require(name == "limit-copy" or not inside or bool(wanted), f"{name}: nothing at {center}")


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One row per way, one column per size of volume and patch; in brackets multiples of ours at first use."""
    scenes = [result["scene"] for result in results]
    head = [f"{scene['kind']}, " + "×".join(map(str, scene["shape"])) + f", {scene['patch_size']}³" for scene in scenes]
    rows = [["milliseconds", *head], ["---"] * (len(head) + 1)]
    for name, title in results[0]["titles"].items():
        cells = []
        for result in results:
            ratios = [a / b for a, b in zip(result["ms"][name], result["ms"]["ours-tensors"], strict=True)]
            cells.append(f"{median(result['ms'][name]):.1f} ({median(ratios):.2g} ×)")
        rows.append([title, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _read(file: Path | None) -> list[dict[str, Any]]:
    if file is None or not file.exists():
        return []
    kept = json.loads(file.read_text())
    results: list[dict[str, Any]] = kept["results"] if kept["package"] == package_state() else []
    return results


def _is_of(result: Mapping[str, Any], scene: Scene) -> bool:
    of = result["scene"]
    return (tuple(of["shape"]), of["patch_size"], of["kind"]) == (scene.shape, scene.patch_size, scene.kind)
