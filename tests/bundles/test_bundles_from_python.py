# SPDX-License-Identifier: Apache-2.0
"""Bundles with the queue, run by Python code: the classes and functions of ``monai.bundle``, JSON and YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import monai.bundle
import pytest
from monai.bundle import ConfigParser, ConfigWorkflow

import monai_patchqueue
from monai_patchqueue import PatchQueueLoader
from tests.bundles.zoo import BUNDLES, VALIDATION, VOLUMES, write_bundle, write_volumes

OVERRIDE = Path(__file__).parents[2] / "bundles" / "overrides" / "queue.json"
STEPS = VOLUMES - VALIDATION

pytestmark = pytest.mark.usefixtures("global_state_is_restored")


@pytest.fixture(scope="module", params=[".json", ".yaml"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("from_python") / "bundle", "brats_mri", request.param)


def settings(folder: Path, target: str = "PatchQueueLoader") -> dict[str, Any]:
    """One short epoch, after which the loader and its figures are noted in a file."""
    note = "$print(repr(@train#dataloader), file=open(@output_dir + '/loader', 'w'), flush=True)"
    return {
        "train#dataloader#_target_": target,
        "train#dataloader#num_workers": 0,
        "epochs": 1,
        "val_interval": 2,
        "output_dir": str(folder),
        "logging_file": False,
        "run": ["$@train#trainer.run()", note],
    }


def assert_queue_ran(folder: Path) -> None:
    noted = (folder / "loader").read_text()
    assert noted.startswith("PatchQueueLoader(")
    assert f"drawn={STEPS}" in noted


def test_monai_bundle_run_takes_the_short_name_of_the_class(config: Path, tmp_path: Path) -> None:
    monai.bundle.run(config_file=str(config), **settings(tmp_path))
    assert_queue_ran(tmp_path)


def test_monai_bundle_run_takes_the_override_file(config: Path, tmp_path: Path) -> None:
    rest = {key: value for key, value in settings(tmp_path).items() if not key.endswith("_target_")}
    monai.bundle.run(config_file=[str(config), str(OVERRIDE)], **rest)
    assert_queue_ran(tmp_path)


def test_run_workflow_takes_the_flag(config: Path, tmp_path: Path) -> None:
    flag = settings(tmp_path, "monai_patchqueue.PatchQueueLoader")
    monai.bundle.run_workflow("ConfigWorkflow", config_file=str(config), workflow_type="train", **flag)
    assert_queue_ran(tmp_path)


def test_a_workflows_parts_can_be_used_one_by_one(config: Path, tmp_path: Path) -> None:
    workflow = ConfigWorkflow(str(config), workflow_type="train", **settings(tmp_path))
    workflow.initialize()
    loader = workflow.parser.get_parsed_content("train#dataloader")
    assert isinstance(loader, PatchQueueLoader)
    assert workflow.trainer.data_loader is loader
    assert len(list(loader)) == STEPS


def test_a_config_that_python_makes_trains_with_the_queue(tmp_path: Path) -> None:
    write_volumes(tmp_path / "data", channels=1, classes=2)
    parser = ConfigParser({**BUNDLES["pancreas_ct_dints"](), "bundle_root": str(tmp_path)})
    parser.update(settings(tmp_path))
    trainer, loader = (parser.get_parsed_content(f"train#{name}") for name in ("trainer", "dataloader"))
    trainer.run()
    assert type(loader) is PatchQueueLoader
    assert trainer.state.iteration == len(loader) == STEPS // 2
    assert loader.stats().patches == STEPS


def test_every_public_name_is_found_by_its_short_name() -> None:
    for name in monai_patchqueue.__all__:
        found = getattr(monai_patchqueue, name)
        if isinstance(found, type):
            parser = ConfigParser({"object": {"_target_": name, "_mode_": "callable"}})
            assert parser.get_parsed_content("object") is found, name
