# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_patchqueue.transforms import (
    GridPatchSamplesd,
    RandLabelPatch,
    RandLabelPatchd,
    RandUniformPatch,
    RandUniformPatchd,
    RandWeightedPatch,
    RandWeightedPatchd,
)
from monai_patchqueue.transforms._meta import Places
from tests.sampling.chi_square import p_value
from tests.volumes import blobs, numbered


def corner(patch: Any) -> int:
    """The number of the patch's first voxel in a numbered volume."""
    return int(np.asarray(patch).reshape(-1)[0])


def middle(patch: Any) -> Any:
    """The patch's center voxel, in channel 0."""
    return patch[(0, *(n // 2 for n in patch.shape[1:]))]


@pytest.mark.parametrize("shape", [(9, 8), (5, 6, 4), (7,), (3, 4, 3, 3)])
@pytest.mark.parametrize("size", [2, 3])
def test_every_legal_start_is_equally_likely_the_first_and_the_last_included(shape: tuple[int, ...], size: int) -> None:
    volume = numbered(*shape)
    counts = Counter(corner(p) for p in RandUniformPatch(size, 4000).set_random_state(0)(volume))
    starts = volume[(0, *(slice(0, n - size + 1) for n in shape))].reshape(-1).tolist()
    assert set(counts) == set(starts)
    assert p_value(np.array([counts[s] for s in starts]), np.ones(len(starts))) > 1e-3


def test_a_patch_as_large_as_the_volume_is_the_volume() -> None:
    volume = numbered(4, 5)
    for crop in (RandUniformPatch((4, 5)), RandUniformPatch(-1), RandUniformPatch((-1, 5))):
        assert (crop(volume)[0] == volume).all()


@pytest.mark.parametrize("border", ["inside", "pad"])
@pytest.mark.parametrize("size", [3, 4, (2, 5, 4)])
def test_the_center_voxel_of_a_label_crop_has_a_drawn_class(size: Any, border: str) -> None:
    label = blobs(16, 14, 12)
    crop = RandLabelPatch(size, 200, {"1": 1, "3": 2}, border=border).set_random_state(0)
    assert {int(middle(p)) for p in crop(label, label=label)} == {1, 3}


def test_a_clamped_label_crop_contains_the_drawn_class_and_says_where_it_is() -> None:
    label = np.zeros((1, 9, 9), dtype=np.uint8)
    label[0, 0, 8] = 1
    item = {"image": numbered(9, 9), "label": label}
    (patch,) = RandLabelPatchd(["image", "label"], "label", 4, border="clamp")(item)
    assert patch["label"].max() == 1
    assert patch["patch_location"] == ((0, 4), (5, 9))


def test_classes_are_drawn_by_their_probabilities_among_those_present() -> None:
    label = blobs(30, 30, 30)
    n = 3000
    crop = RandLabelPatch(5, n, [1, 2, 0, 1, 6]).set_random_state(0)
    counts = Counter(int(middle(p)) for p in crop(label, label=label))
    assert set(counts) == {0, 1, 3}
    assert p_value(np.array([counts[0], counts[1], counts[3]]), np.array([1.0, 2, 1])) > 1e-3


def test_weights_give_patches_in_proportion_and_only_channel_0_counts() -> None:
    weights = np.zeros((2, 8, 8), dtype=np.float32)
    weights[0, 2, 2], weights[0, 6, 6], weights[1] = 1, 3, 99
    counts = Counter(int(middle(p)) for p in RandWeightedPatch(3, 2000).set_random_state(0)(numbered(8, 8), weights))
    first, second = 2 * 8 + 2 + 1, 6 * 8 + 6 + 1
    assert set(counts) == {first, second}
    assert p_value(np.array([counts[first], counts[second]]), np.array([1.0, 3])) > 1e-3


@pytest.mark.parametrize(
    ("fraction", "n", "shares"), [(0.25, 8, {2}), (0.33, 4, {1, 2}), (0, 3, {0}), (1, 3, {3}), (0.1, 30, {3})]
)
def test_the_foreground_fraction_is_exact_after_rounding(fraction: float, n: int, shares: set[int]) -> None:
    label = np.zeros((1, 999, 999), dtype=np.uint8)
    label[0, 500, 500] = 1
    crop = RandLabelPatch(3, n, foreground_fraction=fraction).set_random_state(2)
    found = [sum(int(middle(p)) for p in crop(label, label=label)) for _ in range(60)]
    assert set(found) == shares
    if len(shares) == 2:
        assert abs(np.mean(found) - n * fraction) < 0.2


def test_patches_by_label_and_uniform_ones_are_mixed() -> None:
    label = np.zeros((1, 40, 40), dtype=np.uint8)
    label[0, 20, 20] = 1
    crop = RandLabelPatch(3, 2, foreground_fraction=0.5).set_random_state(0)
    assert {tuple(int(middle(p)) for p in crop(label, label=label)) for _ in range(20)} == {(0, 1), (1, 0)}


def test_an_ignored_class_is_no_center_of_any_patch() -> None:
    label = np.full((1, 12, 12), 255, dtype=np.uint8)
    label[0, 4:8, 4:8] = 0
    label[0, 5, 5] = 1
    crop = RandLabelPatch(3, 100, foreground_fraction=0.3, ignore_label=255).set_random_state(0)
    assert {int(middle(p)) for p in crop(label, label=label)} == {0, 1}
    everything = RandLabelPatch(3, 10, ignore_label=255)
    assert {int(middle(p)) for p in everything(label, label=label)} == {1}


def test_channels_of_a_label_are_classes_that_may_overlap() -> None:
    label = np.zeros((3, 12, 12), dtype=bool)
    label[0, 2:10, 2:10] = label[1, 4:8, 4:8] = label[2, 5, 5] = True
    patches = RandLabelPatch(3, 300, {"0": 1, "2": 1}).set_random_state(0)(label, label=label)
    centers = Counter(tuple(bool(c) for c in p[:, 1, 1]) for p in patches)
    assert all(center[0] for center in centers)
    assert centers[True, True, True] > 120
    assert all(p[:, 1, 1].any() for p in RandLabelPatch(3, 100)(label, label=label))


@pytest.mark.parametrize("crop", [RandWeightedPatchd("image", "guide", 4), RandLabelPatchd("image", "guide", 4)])
@pytest.mark.parametrize("lack", ["zeros", "border", "missing"])
def test_nothing_to_draw_from_is_an_error_that_names_file_and_key_and_the_way_out(crop: Any, lack: str) -> None:
    guide = np.zeros((1, 9, 9), dtype=np.float32)
    guide[0, 0, 0] = lack == "border"
    item = {"image": MetaTensor(numbered(9, 9), meta={"filename_or_obj": "case_3.nii"})}
    if lack != "missing":
        item["guide"] = guide
    loose = type(crop)("image", "guide", 4, allow_missing_keys=True)
    with pytest.raises(ValueError, match=r"'case_3.nii', key 'guide'.*uniform"):
        loose(item)
    starts = {
        corner(p["image"])
        for p in type(crop)("image", "guide", 4, 300, on_empty="uniform", allow_missing_keys=True)(item)
    }
    assert len(starts) == 36


def test_the_error_of_an_absent_class_says_what_the_label_holds() -> None:
    label = blobs(12, 12)
    with pytest.raises(
        ValueError, match=r"no voxel of class \[9\] among the legal centers 2\.\.\.10.*holds .*\{0: \d+, 1: "
    ):
        RandLabelPatch(4, label_probabilities={"9": 1})(label, label=label)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_broken_weight_map_is_named_with_file_and_key(bad: float) -> None:
    weights = np.ones((1, 6, 6), dtype=np.float32)
    weights[0, 0, 0] = bad
    item = {"image": numbered(6, 6), "w": MetaTensor(weights, meta={"filename_or_obj": "map.nii"})}
    with pytest.raises(ValueError, match=r"'map.nii', key 'w': the weight map holds"):
        RandWeightedPatchd("image", "w", 2)(item)


def test_the_same_seed_gives_the_same_patches_and_only_r_is_used() -> None:
    item = {"image": numbered(20, 20), "label": blobs(20, 20)}
    crop = RandLabelPatchd(["image"], "label", 4, 8, foreground_fraction=0.4)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    runs = []
    for _ in range(2):
        crop.set_random_state(7)
        runs.append([corner(p["image"]) for p in crop(item) + crop(item)])
    crop.R = np.random.RandomState(7)
    runs.append([corner(p["image"]) for p in crop(item) + crop(item)])
    assert runs[0] == runs[1] == runs[2]
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_randomness_is_drawn_in_randomize_alone() -> None:
    item = {"image": numbered(20, 20), "label": blobs(20, 20), "w": np.ones((1, 20, 20))}
    for crop in (
        RandUniformPatchd("image", 4),
        RandLabelPatchd("image", "label", 4),
        RandWeightedPatchd("image", "w", 4),
    ):
        crop.set_random_state(0)
        geometry = crop.cropper.geometry(item["image"], "image")
        starts = (
            crop.randomize(geometry, 3) if isinstance(crop, RandUniformPatchd) else crop.randomize(item, geometry, 3)
        )
        before = crop.R.get_state()[2]
        crop.cropper.cut(item["image"], Places(starts, geometry))
        assert crop.R.get_state()[2] == before


@pytest.mark.parametrize("kind", ["numpy", "tensor", "meta"])
def test_arrays_tensors_and_metatensors_give_the_same_patches(kind: str) -> None:
    volume, label = numbered(10, 9, 8, channels=3), blobs(10, 9, 8)
    convert = {"numpy": np.asarray, "tensor": torch.from_numpy, "meta": MetaTensor}[kind]
    crop = RandLabelPatchd(["image", "label"], "label", (4, 3, -1), 5, "balanced").set_random_state(3)
    expected = crop({"image": volume, "label": label})
    crop.set_random_state(3)
    found = crop({"image": convert(volume), "label": convert(label)})
    for a, b in zip(expected, found, strict=True):
        for key in ("image", "label"):
            assert type(b[key]) is {"numpy": np.ndarray, "tensor": torch.Tensor, "meta": MetaTensor}[kind]
            assert (a[key] == np.asarray(b[key])).all()


def test_a_bfloat16_volume_is_cut_and_a_bfloat16_map_is_read() -> None:
    image = torch.rand(1, 8, 8).bfloat16()
    (patch,) = RandWeightedPatch(3)(image, weight_map=image + 0.1)
    assert patch.dtype == torch.bfloat16


def test_a_grid_gives_every_position_in_order() -> None:
    item = {"image": numbered(7, 6)}
    found = [p["patch_location"] for p in GridPatchSamplesd("image", (4, 3), (1, 0))(item)]
    assert found == [((a, a + 4), (b, b + 3)) for a in (0, 3) for b in (0, 3)]


def test_a_padded_grid_covers_the_volume_once_when_overlaps_are_cropped_away() -> None:
    volume = numbered(13, 9)
    cover = np.zeros((13, 9), dtype=int)
    for patch in GridPatchSamplesd("image", 6, 2, True)({"image": volume}):
        (a, _), (b, _) = patch["patch_location"]
        inner = patch["image"][0, 1:-1, 1:-1]
        cover[a + 1 : a + 5, b + 1 : b + 5] += 1
        assert (inner == volume[0, a + 1 : a + 5, b + 1 : b + 5]).all()
    assert (cover >= 1).all()


def test_one_transform_shared_by_threads_cuts_all_keys_at_the_same_place() -> None:
    crop = RandUniformPatchd(["image", "label"], 4, 8)
    volumes = [numbered(30, 30) + 1000 * i for i in range(4)]
    wrong = []

    def work(volume: np.ndarray) -> None:
        for _ in range(40):
            wrong.extend(p for p in crop({"image": volume, "label": volume}) if (p["image"] != p["label"]).any())

    threads = [threading.Thread(target=work, args=(v,)) for v in volumes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
