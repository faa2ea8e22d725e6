# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, list_data_collate
from monai.transforms import Compose, RandWeightedCropd

from monai_patchqueue.transforms import (
    GridPatchSamplesd,
    LabelIndexd,
    RandLabelPatchd,
    RandUniformPatchd,
    RandWeightedPatch,
    RandWeightedPatchd,
    WeightIndexd,
)
from tests.volumes import blobs, meta, numbered


def test_what_is_not_cut_is_shared_between_the_patches_not_copied() -> None:
    notes, table = {"scanner": ["a", "b"]}, torch.rand(1000)
    patches = RandUniformPatchd("image", 4, 5)({"image": numbered(9, 9), "notes": notes, "table": table, "id": 7})
    assert all(p["notes"] is notes and p["table"] is table and p["id"] == 7 for p in patches)
    assert len({id(p) for p in patches}) == 5


def test_volumes_under_unlisted_keys_are_left_out_and_listed_ones_are_cut() -> None:
    item = {
        "image": meta(numbered(9, 8, 7)),
        "w": np.ones((1, 9, 8, 7), np.float32),
        "label": meta(blobs(9, 8, 7)),
        "mask": np.ones((9, 8, 7)),
        "thumbnail": np.zeros((3, 9, 8)),
        "affine": np.eye(4),
    }
    (patch,) = RandWeightedPatchd("image", "w", 4)(item)
    assert sorted(patch) == ["affine", "image", "thumbnail"]
    (patch,) = RandWeightedPatchd(["image", "w", "label"], "w", 4)(item)
    assert patch["w"].shape == patch["label"].shape == (1, 4, 4, 4)


def test_indices_are_left_out_of_the_patches() -> None:
    item = {"image": torch.rand(1, 9, 9), "label": torch.from_numpy(blobs(9, 9)), "w": torch.rand(1, 9, 9)}
    indexed = WeightIndexd("w")(LabelIndexd("label")(item))
    assert len(indexed) == 5
    for crop in (
        RandLabelPatchd("image", "label", 3),
        RandWeightedPatchd("image", "w", 3),
        GridPatchSamplesd("image", 3),
    ):
        assert sorted(crop(indexed)[0]) == ["image", "patch_location"]


def test_the_item_and_its_arrays_are_left_as_they_are() -> None:
    item = {"image": meta(numbered(9, 9, 9)), "w": np.random.default_rng(0).random((1, 9, 9, 9))}
    before = {k: np.array(v) for k, v in item.items()}
    RandWeightedPatchd(["image", "w"], "w", 4, 3)(item)
    assert sorted(item) == ["image", "w"]
    assert all((np.asarray(item[k]) == before[k]).all() for k in item)


def test_a_shared_numpy_array_is_not_modified_by_collation() -> None:
    data = [{"image": numbered(9, 9), "table": np.arange(5)}] * 2
    batch = next(iter(DataLoader(Dataset(data, RandUniformPatchd("image", 4, 3)), batch_size=2)))
    assert batch["image"].shape == (6, 1, 4, 4)
    assert batch["table"].shape == (6, 5)
    assert len(batch["patch_location"]) == 2


@pytest.mark.parametrize("shape", [(40,), (20, 18), (9, 8, 7), (5, 6, 5, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_volumes_of_any_number_of_axes_and_channels_are_cut(shape: tuple[int, ...], channels: int) -> None:
    image, label = numbered(*shape, channels=channels), blobs(*shape)
    item = {"image": MetaTensor(image) if len(shape) < 4 else torch.from_numpy(image), "label": label, "w": label}
    for crop in (
        RandUniformPatchd(["image", "label"], 3, 2),
        RandLabelPatchd(["image", "label"], "label", 3, 2),
        RandWeightedPatchd(["image", "label"], "w", 3, 2, border="pad"),
        GridPatchSamplesd(["image", "label"], 3),
    ):
        patches = crop(item)
        assert patches[0]["image"].shape == (channels, *(3 for _ in shape))
        assert patches[0]["label"].shape == (1, *(3 for _ in shape))


def test_a_metatensor_may_have_four_spatial_axes() -> None:
    (patch,) = RandUniformPatchd("image", 2)({"image": MetaTensor(numbered(4, 4, 4, 4))})
    start = [a for a, _ in patch["image"].meta["patch_location"]]
    assert patch["image"].affine[:3, 3].tolist() == start[:3]


class TestFaultsOfMonaiAndTorchio:
    """What MONAI 1.6's and TorchIO 1.2's samplers do otherwise."""

    def test_an_int_is_a_size_for_all_axes_of_a_weighted_crop(self) -> None:
        item = {"image": torch.rand(1, 9, 9, 9), "w": torch.ones(1, 9, 9, 9)}
        with pytest.raises(Exception):  # noqa: B017, PT011
            RandWeightedCropd("image", "w", 5)(item)
        assert RandWeightedPatchd("image", "w", 5)(item)[0]["image"].shape == (1, 5, 5, 5)

    def test_an_oversized_patch_never_shrinks_in_silence(self) -> None:
        item = {"image": torch.rand(1, 9, 9), "w": torch.ones(1, 9, 9)}
        assert RandWeightedCropd("image", "w", (12, 5))(item)[0]["image"].shape == (1, 9, 5)
        with pytest.raises(ValueError, match="smaller than the patch"):
            RandWeightedPatchd("image", "w", (12, 5))(item)

    def test_one_negative_weight_is_an_error_not_a_shift_of_the_whole_map(self) -> None:
        weights = torch.zeros(1, 50, 50)
        weights[0, 25, 25], weights[0, 3, 3] = 1, -1
        with pytest.raises(ValueError, match="negative"):
            RandWeightedPatch(5)(weights, weight_map=weights)

    @pytest.mark.parametrize("broken", [0.0, float("nan"), float("inf")])
    def test_a_map_of_zeros_nan_or_infinity_never_becomes_uniform_in_silence(self, broken: float) -> None:
        weights = torch.full((1, 9, 9), broken)
        with pytest.raises(ValueError, match=r"no weight > 0|NaN or infinite"):
            RandWeightedPatch(5)(weights, weight_map=weights)

    def test_centers_are_not_cast_to_16_bits(self) -> None:
        label = np.zeros((1, 70_001, 3), dtype=np.uint8)
        label[0, 69_998, 1] = 1
        (patch,) = RandLabelPatchd(["label"], "label", (5, 3))({"label": label})
        assert patch["patch_location"] == ((69_996, 70_001), (0, 3))

    def test_repeated_calls_draw_other_centers_of_a_class(self) -> None:
        crop = RandLabelPatchd(["label"], "label", 3)
        label = blobs(30, 30)
        assert len({crop({"label": label})[0]["patch_location"] for _ in range(30)}) > 20

    def test_an_absent_class_is_skipped_and_the_others_renormalized(self) -> None:
        label = blobs(20, 20, classes=1)
        patches = RandLabelPatchd(["label"], "label", 3, 400, {0: 1, 1: 1, 9: 98})({"label": label})
        counts = Counter(int(p["label"][0, 1, 1]) for p in patches)
        assert set(counts) == {0, 1}
        assert 150 < counts[0] < 250

    def test_class_shares_do_not_depend_on_voxels_outside_the_legal_centers(self) -> None:
        label = np.zeros((1, 20, 20), dtype=np.uint8)
        label[0, :5] = 1  # mostly at the border
        label[0, 10, 10] = 2
        patches = RandLabelPatchd(["label"], "label", 9, 400, {1: 1, 2: 1})({"label": label})
        counts = Counter(int(p["label"][0, 4, 4]) for p in patches)
        assert 150 < counts[2] < 250

    def test_the_number_of_patches_is_the_volumes_own(self) -> None:
        data = [{"image": numbered(9, 9), "n": n} for n in (1, 4, 2)]
        dataset = Dataset(data, Compose([RandUniformPatchd("image", 3, "n")]))
        assert [len(patches) for patches in dataset] == [1, 4, 2]
        assert list_data_collate(list(dataset))["image"].shape[0] == 7
