# SPDX-License-Identifier: Apache-2.0
"""Bundles in the shape of the model zoo's, by one flag."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from monai_patchqueue import PatchQueueLoader
from tests.bundles.zoo import BUNDLES, VALIDATION, VOLUMES, write_bundle
from tests.processes import on_ranks

ROOT = Path(__file__).parents[2]
OVERRIDE = ROOT / "bundles" / "overrides" / "queue.json"
FLAG = {"train#dataloader#_target_": "monai_patchqueue.PatchQueueLoader"}
TRAINING = VOLUMES - VALIDATION
# Patches of a volume, and what the original's batch_size counts.
SAMPLES = {"spleen_ct": 4, "swin_unetr_btcv": 2, "whole_body_ct": 1, "brats_mri": 1, "pancreas_ct_dints": 1}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each bundle's training config."""
    folder = tmp_path_factory.mktemp("zoo")
    return {name: write_bundle(folder / name, name) for name in BUNDLES}


@pytest.fixture(autouse=True)
def one_thread(global_state_is_restored: None) -> None:
    torch.set_num_threads(1)


def make(config: Path | list[Path], **settings: Any) -> ConfigWorkflow:
    """A bundle, with its trainer made."""
    files = [str(file) for file in config] if isinstance(config, list) else str(config)
    workflow = ConfigWorkflow(files, logging_file=False, **settings)
    workflow.initialize()
    workflow.parser.get_parsed_content("train#trainer").logger.setLevel(logging.WARNING)
    return workflow


class Watch:
    """What a bundle's trainer gets."""

    def __init__(self, workflow: ConfigWorkflow) -> None:
        self.trainer = workflow.parser.get_parsed_content("train#trainer")
        self.loader = workflow.parser.get_parsed_content("train#dataloader")
        self.files: list[Counter[str]] = []
        self.sizes: list[int] = []
        self.losses: list[float] = []
        self.structure: dict[str, Any] = {}
        self.trainer.add_event_handler(Events.EPOCH_STARTED, lambda: self.files.append(Counter()))
        self.trainer.add_event_handler(Events.GET_BATCH_COMPLETED, self.batch)
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.iteration)

    def batch(self) -> None:
        batch = self.trainer.state.batch
        self.files[-1].update(Path(name).name for name in batch["image"].meta["filename_or_obj"])
        self.sizes.append(len(batch["image"]))
        for key, value in batch.items():
            self.structure[key] = type(value)
            if isinstance(value, torch.Tensor):
                meta = sorted(map(str, getattr(value, "meta", {})))
                self.structure[key] = (type(value), value.dtype, tuple(value.shape), meta)

    def iteration(self) -> None:
        self.losses += [output["loss"] for output in self.trainer.state.output]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_trains_by_one_flag_on_what_monais_loader_gives(name: str, bundles: dict[str, Path]) -> None:
    settings = {"epochs": 1, "train#dataloader#num_workers": 0, "output_dir": str(bundles[name].parent / "monai")}
    watches = []
    for flag in (
        {"val_interval": 2},
        {**FLAG, "train#dataloader#batch_unit": "volume", "train#dataloader#num_workers": 2},
    ):
        workflow = make(bundles[name], **{**settings, **flag})
        watches.append(Watch(workflow))
        workflow.run()
        workflow.finalize()
    assert 0 <= workflow.parser.get_parsed_content("validate#evaluator").state.metrics["val_mean_dice"] <= 1
    assert (bundles[name].parents[1] / "models" / "model.pt").exists()
    original, queue = watches
    assert isinstance(queue.loader, PatchQueueLoader)
    queue.loader.close()
    # The same number of steps, of batches of the same size and content, and every volume as often.
    assert queue.sizes == original.sizes
    assert queue.structure == original.structure
    assert queue.files == original.files
    assert set(queue.files[0].values()) == {SAMPLES[name]}
    assert torch.isfinite(torch.tensor(queue.losses)).all()


def test_without_a_batch_unit_patches_are_counted_and_the_difference_is_named(bundles: dict[str, Path]) -> None:
    settings = {**FLAG, "epochs": 1, "train#dataloader#num_workers": 0, "validate#dataset#data": []}
    with pytest.warns(UserWarning, match=r"batch_size=2 counts patches here: 2 in a batch.*4 × 2 patches"):
        watch = Watch(make(bundles["spleen_ct"], **settings))
    assert len(watch.loader) == TRAINING * SAMPLES["spleen_ct"] // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_for_several_gpus_trains_on_ranks_that_share_the_volumes(
    name: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    config = bundles[name]
    settings = {**FLAG, "epochs": 1, "val_interval": 2, "train#dataloader#batch_unit": "volume"}

    def rank() -> tuple[Counter[str], list[int], int]:
        multi_gpu = config.with_name("multi_gpu_train.json")
        workflow = make([config, multi_gpu], **settings, output_dir=str(tmp_path / str(dist.get_rank())))
        watch = Watch(workflow)
        workflow.run()
        watch.loader.close()
        handlers = workflow.parser.get_parsed_content("train#trainer#train_handlers")
        return watch.files[0], watch.sizes, len(handlers)

    (files, sizes, handlers), (others, other_sizes, other_handlers) = on_ranks(2, rank, tmp_path)
    assert not files.keys() & others.keys()
    assert len(files) + len(others) == TRAINING
    assert {*files.values(), *others.values()} == {SAMPLES[name]}
    assert sizes == other_sizes
    assert handlers - other_handlers == 2


@pytest.mark.parametrize("name", ["spleen_ct", "brats_mri"])
def test_the_override_file_puts_queue_and_figures_in_and_keeps_the_batch_size(
    name: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    original = json.loads(bundles[name].read_text())
    original["train"]["dataloader"]["prefetch_factor"] = 4
    config = tmp_path / "train.json"
    config.write_text(json.dumps(original))
    workflow = make([config, OVERRIDE], epochs=1, val_interval=2, output_dir=str(tmp_path))
    watch = Watch(workflow)
    workflow.run()
    assert isinstance(watch.loader, PatchQueueLoader)
    assert watch.loader.batch_unit == "volume"
    assert len(watch.sizes) == TRAINING // original["train"]["dataloader"]["batch_size"]
    assert watch.trainer.state.metrics["queue_patches_per_second"] > 0
    assert {key for key in watch.trainer.state.metrics if key.startswith("queue")} == {
        "queue_starved",
        "queue_fill",
        "queue_patches_per_second",
    }


@pytest.mark.slow
def test_the_override_file_leaves_each_rank_its_handlers(bundles: dict[str, Path], tmp_path: Path) -> None:
    config = bundles["spleen_ct"]

    def rank() -> tuple[dict[str, Any], list[str]]:
        files = [config, config.with_name("multi_gpu_train.json"), OVERRIDE]
        workflow = make(files, epochs=1, val_interval=2, output_dir=str(tmp_path / str(dist.get_rank())))
        workflow.run()
        workflow.parser.get_parsed_content("train#dataloader").close()
        handlers = workflow.parser.get_parsed_content("train#trainer#train_handlers")
        metrics = workflow.parser.get_parsed_content("train#trainer").state.metrics
        return dict(metrics), [type(handler).__name__ for handler in handlers]

    (metrics, handlers), (other_metrics, other_handlers) = on_ranks(2, rank, tmp_path)
    assert handlers == ["ValidationHandler", "StatsHandler", "TensorBoardStatsHandler"]
    assert other_handlers == ["ValidationHandler"]
    assert "queue_starved" in metrics
    assert "queue_starved" in other_metrics


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_torchrun_starts_a_bundle_with_the_flag(bundles: dict[str, Path], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(port), "-m", "monai.bundle", "run"]
    command += ["--config_file", "['configs/train.json','configs/multi_gpu_train.json']"]
    command += ["--train#dataloader#_target_", FLAG["train#dataloader#_target_"], "--epochs", "1"]
    command += ["--train#dataloader#batch_unit", "volume", "--output_dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    folder = bundles["spleen_ct"].parents[1]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, env=environment, cwd=folder, **pipes, timeout=180, check=False)
    output = done.stdout
    assert done.returncode == 0, output[-5000:]
    # Four volumes, two a batch, on two ranks: one step.
    assert "Iter: 1/1 --" in output
    assert "val_mean_dice" in output
