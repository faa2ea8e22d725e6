# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser, ConfigWorkflow
from torch.utils.data import DataLoader, WeightedRandomSampler

from monai_patchqueue import PatchQueueLoader
from monai_patchqueue.report.bundle_loader import (
    as_queue_loader,
    build_dataloader,
    find_dataloader,
    overrides_for,
    read_bundle,
)
from tests.pipelines import Patches, make_loader
from tests.report.bundles import write_bundle


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"train": {"dataloader": {"_target_": "X"}}, "other": {"_target_": "DataLoader"}}, "train#dataloader"),
        ({"t": {"_target_": "Trainer", "train_data_loader": "@a#b"}, "a": {"b": "$make()"}}, "a#b"),
        ({"parts": [{"_target_": "monai.data.ThreadDataLoader"}, {"_target_": "Compose"}]}, "parts#0"),
        ({"train_loader": {"_target_": "DataLoader"}, "val_loader": {"_target_": "DataLoader"}}, "train_loader"),
    ],
)
def test_the_training_loader_is_found_in_a_config(config: dict[str, Any], found: str) -> None:
    assert find_dataloader(ConfigParser(config)) == found


def test_where_the_loader_is_not_clear_the_candidates_are_named() -> None:
    two = ConfigParser({"a": {"_target_": "DataLoader"}, "b": {"_target_": "DataLoader"}})
    with pytest.raises(ValueError, match=r"several loaders \(a, b\): name one with --dataloader_id"):
        find_dataloader(two)
    assert find_dataloader(two, "b") == "b"
    with pytest.raises(ValueError, match="has no 'c'"):
        find_dataloader(two, "c")
    with pytest.raises(ValueError, match="no loader"):
        find_dataloader(ConfigParser({}))


def test_only_what_the_loader_refers_to_is_built(tmp_path: Path) -> None:
    parser = read_bundle([write_bundle(tmp_path)], {"num_workers": 0})
    loader = build_dataloader(parser, "train#dataloader")
    assert isinstance(loader, DataLoader)
    assert loader.num_workers == 0
    with pytest.raises(Exception, match="1 / 0"):
        parser.get_parsed_content("network")


def test_a_queue_of_another_loader_gives_as_many_patches_in_each_batch(tmp_path: Path) -> None:
    loader = build_dataloader(read_bundle([write_bundle(tmp_path)], {"num_workers": 0}), "train#dataloader")
    with as_queue_loader(loader) as queue:
        assert [len(batch["image"]) for batch in queue] == [len(batch["image"]) for batch in loader] == [8, 8]


def test_a_queue_of_one_of_ours_has_the_same_arguments_but_for_the_changes() -> None:
    sampler = WeightedRandomSampler([1.0, 0.0], 4)
    for given in ({"sampler": sampler}, {"shuffle": True}, {"shuffle_patches": False}, {"ram_budget": 0.1}):
        with (
            make_loader([4, 4], batch_size=2, repeats=2, **given) as loader,  # type: ignore[arg-type]
            as_queue_loader(loader, num_workers=1, queue_length=5) as queue,
        ):
            assert (queue.num_workers, queue.batch_size, queue.repeats, queue.queue_length) == (1, 2, 2, 5)
            assert queue.shuffle == given.get("shuffle", False)
            assert (queue.sampler is sampler) == ("sampler" in given)
            assert len(queue) == len(loader)


def test_an_override_makes_the_bundle_run_with_the_queue_and_the_new_settings(tmp_path: Path) -> None:
    config = write_bundle(tmp_path, train__dataloader__prefetch_factor=3, train__dataloader__batch_size=1)
    parser = read_bundle([config], {})
    loader = build_dataloader(parser, "train#dataloader")
    changes = {"num_workers": 2, "samples_per_volume": 8, "queue_length": 16}
    values = overrides_for(parser, "train#dataloader", loader, changes)
    assert values == {
        "train#dataloader#_target_": "monai_patchqueue.PatchQueueLoader",
        "train#dataloader#batch_unit": "volume",
        "train#dataloader#prefetch_factor": None,
        "num_workers": 2,
        "samples": 8,
        "train#dataloader#queue_length": 16,
    }
    override = tmp_path / "override.json"
    override.write_text(json.dumps(values))
    workflow = ConfigWorkflow([config, str(override)], logging_file=False, workflow_type=None)
    assert workflow.run() == [[8, 8, 8, 8]]
    queue = workflow.parser.get_parsed_content("train#dataloader")
    assert isinstance(queue, PatchQueueLoader)
    assert (queue.num_workers, queue.stats().queue_length) == (2, 16)
    queue.close()


def test_an_item_transform_is_moved_to_the_workers_as_the_config_has_it() -> None:
    node = {"_target_": "PatchQueueLoader", "item_transform": "@flip", "num_workers": 2, "ram_budget": 0.5}
    parser = ConfigParser({"loader": node, "flip": {"_target_": "RandFlipd"}})
    loader = make_loader([4, 4])
    changes = {"patch_transform": abs, "item_transform": None, "queue_length": 9}
    assert overrides_for(parser, "loader", loader, changes) == {
        "loader#patch_transform": "@flip",
        "loader#item_transform": None,
        "loader#queue_length": 9,
        "loader#ram_budget": None,
    }


def test_what_an_override_cannot_reach_is_an_error_that_says_so() -> None:
    loader = DataLoader(Patches([1]))
    with pytest.raises(ValueError, match="not a component"):
        overrides_for(ConfigParser({"loader": "$make()"}), "loader", loader, {})
    node = {"_target_": "ThreadDataLoader", "use_thread_workers": True}
    with pytest.raises(ValueError, match="use_thread_workers"):
        overrides_for(ConfigParser({"loader": node}), "loader", loader, {})


def test_the_number_of_samples_needs_one_place_in_the_config(tmp_path: Path) -> None:
    second = {"_target_": "RandCropByPosNegLabelD", "num_samples": 3}
    parser = read_bundle([write_bundle(tmp_path, second=second)], {})
    loader = build_dataloader(parser, "train#dataloader")
    with pytest.raises(ValueError, match=r"RandCropByPosNegLabeld\.num_samples=4 .* 2 places"):
        overrides_for(parser, "train#dataloader", loader, {"samples_per_volume": 8})
