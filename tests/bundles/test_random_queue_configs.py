# SPDX-License-Identifier: Apache-2.0
"""Configs that put a random queue into bundles."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow

from monai_patchqueue import RandomQueueDataset
from monai_patchqueue.data.synthetic import make_synthetic_dataset
from tests.bundles.zoo import VALIDATION, VOLUMES, write_bundle

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "bundles" / "patch_segmentation" / "configs"
OVERRIDE = ROOT / "bundles" / "overrides" / "random_queue.json"
SMALL = {"max_epochs": 2, "val_interval": 2, "num_samples": 6, "batch_size": 4, "num_workers": 1}
SMALL |= {"patch_size": [16, 16, 16], "checkpoint_interval": 100}

pytestmark = pytest.mark.usefixtures("global_state_is_restored")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bundle") / "data"
    return make_synthetic_dataset(folder, num_volumes=4, shape=(40, 36, 32), progress=False)


def train(configs: list[Path], **settings: Any) -> tuple[RandomQueueDataset, Any]:
    """Run a bundle to its end; its loader, and its trainer."""
    workflow = ConfigWorkflow([str(config) for config in configs], logging_file=False, **settings)
    workflow.initialize()
    loader, trainer = (workflow.parser.get_parsed_content(f"train#{name}") for name in ("dataloader", "trainer"))
    trainer.state.sizes = []
    trainer.add_event_handler(
        Events.GET_BATCH_COMPLETED, lambda: trainer.state.sizes.append(tuple(trainer.state.batch["image"].shape))
    )
    workflow.run()
    assert isinstance(loader, RandomQueueDataset)
    return loader, trainer


def test_the_bundles_variant_trains_on_items_that_are_drawn_again(data: str, tmp_path: Path) -> None:
    settings = {**SMALL, "dataset_dir": data, "output_dir": str(tmp_path), "queue_length": 8, "samples_per_insert": 8}
    loader, trainer = train([CONFIGS / "train.json", CONFIGS / "random_queue.json"], **settings)
    steps = 3 * 6 // 4
    with loader:
        assert trainer.state.epoch_length == len(loader) == steps
        assert trainer.state.sizes == [(4, 1, 16, 16, 16)] * (2 * steps)
        # 32 draws, and an item more with every second batch
        assert loader.stats().reuse >= 32 / (8 + 2 * steps // 2)
        assert trainer.state.metrics["queue_reuse"] == loader.stats().reuse
        assert "RandFlipd" not in str(list(loader.stats().transform_seconds))
        assert loader.stats().item_transform_seconds > 0
    assert (tmp_path / "model.pt").is_file()


def test_the_lines_on_the_page_draw_by_the_loss(data: str, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "random_queue.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = {**json.loads(block), "train#dataloader#queue_length": 8, "train#dataloader#epoch_length": 6}
    (tmp_path / "lines.json").write_text(json.dumps(lines))
    settings = {**SMALL, "dataset_dir": data, "output_dir": str(tmp_path), "max_epochs": 1}
    loader, trainer = train([CONFIGS / "train.json", tmp_path / "lines.json"], **settings)
    with loader:
        assert trainer.state.iteration == 6
        assert "importance_weight" in trainer.state.batch[0]
        priorities = loader.state_dict()["residents"]["priorities"]
        assert len(set(priorities)) > 4
        assert all(0 < value < 1.001 for value in priorities)  # Dice losses


def test_the_override_puts_a_random_queue_into_a_bundle_of_the_zoos_shape(tmp_path: Path) -> None:
    config = write_bundle(tmp_path / "spleen_ct", "spleen_ct")
    settings = {"epochs": 1, "val_interval": 2, "output_dir": str(tmp_path), "train#dataloader#num_workers": 1}
    loader, trainer = train([config, OVERRIDE], **settings)
    with loader:
        assert trainer.state.sizes == [(4, 1, 16, 16, 16)] * (VOLUMES - VALIDATION)
        figures = {name for name in trainer.state.metrics if name.startswith("queue")}
        assert figures == {"queue_starved", "queue_fill", "queue_reuse", "queue_age"}


def test_the_override_takes_the_place_of_a_config_for_several_gpus_loader_too(tmp_path: Path) -> None:
    config = write_bundle(tmp_path / "spleen_ct", "spleen_ct")
    parser = ConfigParser()
    parser.read_config([config, config.with_name("multi_gpu_train.json"), OVERRIDE])
    assert parser["train#dataloader"] == json.loads(OVERRIDE.read_text())["train#dataloader"]  # its sampler is gone
