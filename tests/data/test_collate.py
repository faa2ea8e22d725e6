# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose, Invertd, RandFlipd

from monai_patchqueue import PatchQueueLoader, RandUniformPatchd, collate_patches
from tests.volumes import meta, numbered


def items(*sizes: int) -> list[dict[str, Any]]:
    return [
        {
            "image": torch.full((1, size, size), float(size)),
            "array": np.full((size,), size, np.int16),
            "age": 40 + number,
            "dose": 0.5 * number,
            "name": f"case_{number}",
            "info": {"size": size},
        }
        for number, size in enumerate(sizes)
    ]


def quietly(*args: Any, **kwargs: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return collate_patches(*args, **kwargs)


def test_what_fits_together_is_stacked_and_all_else_is_listed() -> None:
    batch = quietly(items(4, 4))
    assert batch["image"].shape == (2, 1, 4, 4)
    assert batch["array"].shape == (2, 4)
    assert batch["array"].dtype == torch.int16
    assert torch.equal(batch["age"], torch.tensor([40, 41]))
    assert torch.equal(batch["dose"], torch.tensor([0.0, 0.5]))
    assert batch["name"] == ["case_0", "case_1"]
    assert batch["info"] == [{"size": 4}, {"size": 4}]


def test_ragged_items_stay_lists_with_one_warning_that_names_keys_and_shapes() -> None:
    with pytest.warns(UserWarning, match=r"'image': \(1, 4, 4\), \(1, 6, 6\); 'array': \(4,\), \(6,\)") as caught:
        batch = collate_patches(items(4, 6))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert [tuple(image.shape) for image in batch["image"]] == [(1, 4, 4), (1, 6, 6)]
    assert all(isinstance(array, torch.Tensor) for array in batch["array"])


@pytest.mark.parametrize("keys", [False, ["name"], "name", ()])
def test_a_warning_that_was_not_wanted_is_not_given(keys: Any) -> None:
    assert isinstance(quietly(items(4, 6), warn_when_unstackable=keys)["image"], list)


@pytest.mark.parametrize("keys", [["array"], "array", {"array"}])
def test_a_warning_is_given_for_the_keys_that_were_named(keys: Any) -> None:
    with pytest.warns(UserWarning, match="lists: 'array': ") as caught:
        collate_patches(items(4, 6), warn_when_unstackable=keys)
    assert "'image'" not in str(caught[0].message)


@pytest.mark.parametrize("keys", [["age", "name"], ("age", "name"), lambda key: key in ("age", "name")])
def test_keys_are_chosen_by_a_list_or_a_function(keys: Any) -> None:
    assert list(quietly(items(4, 6), keys)) == ["age", "name"]


def test_one_key_may_be_named_by_itself() -> None:
    assert list(quietly(items(4, 6), "age")) == ["age"]


def test_each_conversion_can_be_left_out() -> None:
    batch = quietly(items(4, 4), stack_tensors=False, convert_np=False, convert_numbers=False)
    assert [type(values) for values in batch.values()] == [list] * 6
    assert isinstance(batch["array"][0], np.ndarray)
    assert batch["age"] == [40, 41]
    converted = quietly(items(4, 4), stack_tensors=False)
    assert all(isinstance(array, torch.Tensor) for array in converted["array"])
    assert torch.equal(converted["age"], torch.tensor([40, 41]))


def test_values_of_different_kinds_are_listed() -> None:
    batch = quietly([{"a": 1, "b": torch.zeros(2), "c": np.array("x")}, {"a": None, "b": 3, "c": np.array("y")}])
    assert batch["a"] == [1, None]
    assert batch["b"][1] == 3
    assert [str(value) for value in batch["c"]] == ["x", "y"]


def test_tensors_of_different_dtypes_are_promoted() -> None:
    batch = quietly([{"a": torch.tensor([1])}, {"a": torch.tensor([0.5])}])
    assert torch.equal(batch["a"], torch.tensor([[1.0], [0.5]]))


def test_arrays_that_torch_cannot_take_as_they_are_are_copied() -> None:
    array = np.arange(4)[::-1]
    array.flags.writeable = False
    assert torch.equal(quietly([{"a": array}])["a"], torch.tensor([[3, 2, 1, 0]]))


def test_numpys_numbers_are_numbers() -> None:
    batch = quietly([{"a": np.float32(1.5), "b": np.bool_(True)}, {"a": np.float32(2.5), "b": np.bool_(False)}])
    assert torch.equal(batch["a"], torch.tensor([1.5, 2.5]))
    assert torch.equal(batch["b"], torch.tensor([True, False]))


def test_lists_of_patches_come_one_after_the_other() -> None:
    first, second = items(4, 4), items(4)
    assert quietly([first, second])["image"].shape == (3, 1, 4, 4)


def meta_items() -> list[dict[str, Any]]:
    flip = Compose([RandFlipd("image", prob=1.0, spatial_axis=0)])
    return [flip({"image": meta(numbered(4, 5, 6), file=f"{n}.nii.gz", spacing=(n, 2, 3))}) for n in (1, 2)]


def test_meta_tensors_have_the_metadata_that_monais_collation_gives() -> None:
    ours, theirs = quietly(meta_items())["image"], list_data_collate(meta_items())["image"]
    assert isinstance(ours, MetaTensor)
    assert ours.is_batch
    assert torch.equal(ours.as_tensor(), theirs.as_tensor())
    assert torch.equal(ours.affine, theirs.affine)
    assert ours.meta["filename_or_obj"] == ["1.nii.gz", "2.nii.gz"]
    assert ours.meta.keys() == theirs.meta.keys()
    assert [len(trace) for trace in ours.applied_operations] == [1, 1]


def test_a_batch_can_be_decollated_and_inverted() -> None:
    flip = Compose([RandFlipd("image", prob=1.0, spatial_axis=0)])
    invert = Invertd("image", flip, orig_keys="image", nearest_interp=False)
    batch = quietly([flip({"image": meta(numbered(4, 5, 6))}) for _ in range(2)])
    for item in decollate_batch(batch):
        assert torch.equal(invert(item)["image"].as_tensor(), torch.from_numpy(numbered(4, 5, 6)))


def test_a_meta_tensor_beside_a_plain_one_gives_a_plain_batch() -> None:
    batch = quietly([{"a": meta(numbered(3, 3))}, {"a": torch.from_numpy(numbered(3, 3))}])
    assert type(batch["a"]) is torch.Tensor


def test_ragged_meta_tensors_keep_their_metadata() -> None:
    with pytest.warns(UserWarning, match="'image'"):
        batch = collate_patches([{"image": meta(numbered(3, n), file=f"{n}.nii")} for n in (3, 4)])
    assert [image.meta["filename_or_obj"] for image in batch["image"]] == ["3.nii", "4.nii"]


def test_what_cannot_be_collated_is_said() -> None:
    with pytest.raises(ValueError, match=r"item 1 has no key 'b', only \['a'\]"):
        collate_patches([{"a": 1, "b": 2}, {"a": 1}])
    with pytest.raises(TypeError, match="item 0 is a Tensor"):
        collate_patches([torch.zeros(1)])
    with pytest.raises(ValueError, match="nothing to collate"):
        collate_patches([])


@pytest.mark.parametrize("workers", [0, 1])
def test_it_serves_any_dataloader(workers: int) -> None:
    loader = DataLoader(Dataset(items(4, 4, 4)), batch_size=3, num_workers=workers, collate_fn=collate_patches)
    (batch,) = loader
    assert batch["image"].shape == (3, 1, 4, 4)
    assert batch["name"] == ["case_0", "case_1", "case_2"]


def test_it_serves_the_patch_queue() -> None:
    volumes = Dataset([{"image": meta(numbered(16, 16))}] * 2, RandUniformPatchd("image", 12, num_samples=2))
    with PatchQueueLoader(volumes, batch_size=4, batch_unit="patch", collate_fn=collate_patches) as loader:
        (batch,) = loader
    assert batch["image"].shape == (4, 1, 12, 12)
    assert batch["image"].is_batch


def test_a_config_names_it_with_its_arguments() -> None:
    config = {
        "data": [{"image": torch.zeros(1, 4, 4), "extra": 1}] * 4,
        "loader": {
            "_target_": "DataLoader",
            "dataset": {"_target_": "Dataset", "data": "@data"},
            "batch_size": 2,
            "collate_fn": {"_target_": "collate_patches", "_mode_": "callable", "key_filter": ["image"]},
        },
    }
    loader = ConfigParser(config).get_parsed_content("loader")
    assert [list(batch) for batch in loader] == [["image"], ["image"]]
