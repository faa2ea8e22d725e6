# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, MetaTensor, PersistentDataset
from monai.transforms import Compose, EnsureTyped, Flipd, Lambdad, Orientationd, RandFlipd, SpatialPadd

from monai_patchqueue.sampling import WeightIndex, labels
from monai_patchqueue.transforms import LabelIndexd, RandLabelPatchd, RandWeightedPatchd, WeightIndexd
from tests.volumes import blobs, meta

CROP = RandLabelPatchd(["label"], "label", 5, 20, {1: 1, 2: 1})
WEIGH = RandWeightedPatchd(["w"], "w", 5, 20)


def indexed(dtype: type = np.uint8) -> dict[Any, Any]:
    """An item with indices that were drawn from."""
    label = blobs(24, 22, 20, dtype=dtype)
    item = {"label": meta(label), "w": torch.from_numpy(label == 2).float()}
    item = WeightIndexd("w")(LabelIndexd("label")(item))
    CROP(item)
    return item


def built(action: Callable[[], Any]) -> int:
    """How often an action finds the runs of labels, and how many indices of weight maps it builds."""
    with (
        mock.patch.object(labels, "find_runs", side_effect=labels.find_runs) as runs,
        mock.patch.object(WeightIndex, "__init__", autospec=True, side_effect=WeightIndex.__init__) as weights,
    ):
        action()
    return int(runs.call_count + weights.call_count)


def check_centers(item: dict[Any, Any]) -> None:
    """Centers must agree with the voxels as they are now, whether or not an index is in the item."""
    if "label" in item:
        assert all(int(p["label"][0, 2, 2, 2]) in (1, 2) for p in CROP(item))
    if "w" in item:
        assert all(float(p["w"][0, 2, 2, 2]) > 0 for p in WEIGH(item))
        assert {p["w"].dtype for p in WEIGH(item)} <= {torch.float32, torch.float64}


def test_an_index_at_hand_is_used_and_draws_the_same_centers_as_a_new_one() -> None:
    item = indexed()
    assert built(lambda: (CROP(item), WEIGH(item))) == 0
    bare = {key: item[key] for key in ("label", "w")}
    assert built(lambda: (CROP(bare), WEIGH(bare))) == 2
    for crop, key in ((CROP, "label"), (WEIGH, "w")):
        first = crop.set_random_state(5)(item)
        second = crop.set_random_state(5)(bare)
        assert all(
            torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for a, b in zip(first, second, strict=True)
        )


def test_a_deep_copy_keeps_the_index_valid_and_shares_it() -> None:
    item = copy.deepcopy(indexed())
    again = copy.deepcopy(dict(reversed(item.items())))
    assert built(lambda: (CROP(item), WEIGH(item), CROP(again), WEIGH(again))) == 0
    check_centers(again)


@pytest.mark.parametrize("copy_cache", [True, False])
@pytest.mark.parametrize("as_contiguous", [True, False])
def test_a_cached_dataset_pays_once(copy_cache: bool, as_contiguous: bool) -> None:
    data = [{"label": meta(blobs(24, 22, 20, seed=i)), "w": meta(blobs(24, 22, 20) > 0)} for i in range(2)]
    pipeline = Compose([EnsureTyped(["label", "w"]), LabelIndexd("label"), WeightIndexd("w"), CROP])
    dataset = CacheDataset(data, pipeline, copy_cache=copy_cache, as_contiguous=as_contiguous, progress=False)
    assert built(lambda: [dataset[i] for i in range(2)]) == 2
    assert built(lambda: [dataset[i] for _ in range(3) for i in range(2)]) == 0
    assert all(int(p["label"][0, 2, 2, 2]) in (1, 2) for i in range(2) for p in dataset[i])


def test_a_random_flip_after_the_cache_makes_the_index_anew_only_when_it_flips() -> None:
    pipeline = Compose([LabelIndexd("label"), RandFlipd("label", prob=0.5, spatial_axis=0), CROP])
    pipeline.set_random_state(0)
    dataset = CacheDataset([{"label": meta(blobs(24, 22, 20))}], pipeline, progress=False)
    counts = [built(lambda: [check(p) for p in dataset[0]]) for _ in range(20)]
    assert set(counts) == {0, 1}


def check(patch: dict[Any, Any]) -> None:
    assert int(patch["label"][0, 2, 2, 2]) in (1, 2)


@pytest.mark.parametrize(
    "change",
    [
        Flipd(["label", "w"], spatial_axis=0),
        SpatialPadd(["label", "w"], (40, 40, 40)),
        Orientationd("label", "LPS"),
        EnsureTyped(["label", "w"], dtype=torch.float64),
        EnsureTyped(["label", "w"]),
        Lambdad(["label", "w"], lambda x: x.transpose(1, 2)),
        Lambdad(["label", "w"], lambda x: x[:, 2:, 2:]),
        Lambdad(["label", "w"], lambda x: x.clone().flip(1)),
        Lambdad(["label", "w"], lambda x: x.numpy()[:, ::-1].copy()),
    ],
)
def test_no_transform_in_between_leaves_a_stale_index(change: Any) -> None:
    check_centers(change(indexed()))


EDITS: list[Callable[[torch.Tensor], Any]] = [
    lambda x: x.copy_(x.flip(1).clone()),
    lambda x: x[..., ::2].zero_(),
    lambda x: x.mul_(2).remainder_(3),
    lambda x: x.as_tensor().roll(4, 1).clone() if isinstance(x, MetaTensor) else x.set_(x.roll(4, 1)),
    lambda x: x.detach()[0].transpose(0, 1)[:11].fill_(0),
    lambda x: x.view(-1)[1::2].zero_(),
    lambda x: x.numpy().__setitem__(slice(None), np.roll(x.numpy(), 5, 1)),
    lambda x: x.data.copy_(x.flip(2).clone()),
    lambda x: x.squeeze_(0).unsqueeze_(0).transpose_(1, 2),
]


@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_in_place_leaves_a_stale_index(edit: Callable[[torch.Tensor], Any]) -> None:
    for prepared in (indexed(), copy.deepcopy(indexed())):
        for key in ("label", "w"):
            edit(prepared[key])
            check_centers({k: v for k, v in prepared.items() if k.startswith(key)})


def test_an_edit_between_index_and_copy_leaves_no_stale_index() -> None:
    item = indexed()
    item["label"].copy_(item["label"].flip(1).clone())
    check_centers(copy.deepcopy(item))


def test_another_items_index_is_not_used() -> None:
    item, other = indexed(), indexed()
    other["label"] = torch.from_numpy(blobs(24, 22, 20, seed=3))
    other["label_label_index"] = item["label_label_index"]
    assert all(int(p["label"][0, 2, 2, 2]) in (1, 2) for p in CROP(other))


def test_numpy_arrays_keep_no_count_of_changes_and_get_no_index() -> None:
    item = LabelIndexd("label")({"label": blobs(9, 9)})
    assert list(item) == ["label"]


def test_a_tensor_of_inference_mode_is_indexed_anew() -> None:
    with torch.inference_mode():
        item = LabelIndexd("label")({"label": torch.from_numpy(blobs(24, 22, 20)).clone()})
        assert built(lambda: CROP(item)) == 1


def test_a_pickled_item_is_right_and_no_larger() -> None:
    item = indexed()
    loaded = pickle.loads(pickle.dumps(item))
    check_centers(loaded)
    volumes = {key: item[key] for key in ("label", "w")}
    assert len(pickle.dumps(item)) < len(pickle.dumps(volumes)) + 500


@pytest.mark.parametrize("track_meta", [False, True])
def test_a_persistent_dataset_loads_what_it_saved(tmp_path: Path, track_meta: bool) -> None:
    data = [{"label": torch.from_numpy(blobs(24, 22, 20))}]
    pipeline = Compose([LabelIndexd("label"), CROP])
    for _ in range(2):
        dataset = PersistentDataset(data, pipeline, cache_dir=tmp_path, track_meta=track_meta)
        for patch in dataset[0]:
            check(patch)


def test_an_index_does_not_keep_its_volume_alive() -> None:
    item = indexed()
    del item["label"]
    assert item["label_label_index"]._volume() is None
