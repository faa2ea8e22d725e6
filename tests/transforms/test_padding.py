# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.utils import NumpyPadMode, PytorchPadMode

from monai_patchqueue.transforms import GridPatchSamplesd, RandLabelPatchd, RandUniformPatch, RandUniformPatchd
from tests.volumes import meta, numbered

NUMPY = ["constant", "edge", "reflect", "symmetric", "wrap", "linear_ramp", "maximum", "mean", "median", "minimum"]
TORCH = {"replicate": "edge", "circular": "wrap"}


def padded(volume: np.ndarray, mode: str, by: int) -> np.ndarray:
    widths = [(0, 0), *((by, by) for _ in volume.shape[1:])]
    result: np.ndarray = np.pad(volume, widths, mode=TORCH.get(mode, mode))  # type: ignore[call-overload]
    return result


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, meta])
@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric", "wrap", *TORCH])
def test_an_overhanging_patch_looks_as_if_the_whole_volume_had_been_padded(mode: str, kind: Any) -> None:
    volume = numbered(7, 3, 5, channels=2)
    whole = padded(volume, mode, 6)
    crop = RandUniformPatchd("image", (6, 5, 4), 60, border="pad", padding_mode=mode)
    for patch in crop({"image": kind(volume)}):
        location = patch["patch_location"] if kind is not meta else patch["image"].meta["patch_location"]
        expected = whole[(slice(None), *(slice(a + 6, b + 6) for a, b in location))]
        assert (np.asarray(patch["image"]) == expected).all()


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("mode", [*NUMPY, *TORCH])
def test_a_small_volume_is_padded_just_enough_by_any_of_numpys_and_torchs_modes(mode: str, kind: Any) -> None:
    volume = numbered(5, 9).astype(np.float64)
    (patch,) = RandUniformPatchd("image", (8, 9), padding_mode=mode)({"image": kind(volume)})
    assert patch["patch_location"] == ((-2, 6), (0, 9))
    expected = np.pad(volume, [(0, 0), (2, 1), (0, 0)], mode=TORCH.get(mode, mode))  # type: ignore[call-overload]
    assert np.allclose(np.asarray(patch["image"]), expected)


def test_the_mode_empty_keeps_the_volume_in_place() -> None:
    volume = numbered(5, 4)
    (patch,) = RandUniformPatch((8, 4), padding_mode="empty")(volume)
    assert (patch[:, 2:7] == volume).all()


@pytest.mark.parametrize("mode", [NumpyPadMode.EDGE, PytorchPadMode.REPLICATE])
def test_monais_enumerations_name_modes_too(mode: Any) -> None:
    (patch,) = RandUniformPatch((6,), padding_mode=mode)(numbered(4))
    assert patch.tolist() == [[1, 1, 2, 3, 4, 4]]


def test_a_number_is_a_constant_and_each_key_may_have_its_own_mode() -> None:
    item = {"image": numbered(4).astype(np.float32), "label": torch.from_numpy(numbered(4))}
    (patch,) = RandUniformPatchd(["image", "label"], 6, padding_mode=[-7.5, "edge"])(item)
    assert patch["image"].tolist() == [[-7.5, 1, 2, 3, 4, -7.5]]
    assert patch["label"].tolist() == [[1, 1, 2, 3, 4, 4]]
    (patch,) = RandUniformPatchd(["image", "label"], 6, border="pad")({k: v[:, :1] for k, v in item.items()})
    assert patch["image"].tolist() == [[0, 0, 0, 1, 0, 0]]


def test_a_small_volume_has_one_place_and_its_other_axes_are_free() -> None:
    label = np.zeros((1, 3, 20), dtype=np.uint8)
    label[0, 1, 2:18] = 1
    patches = RandLabelPatchd("label", "label", (6, 4), 200, padding_mode="constant")({"label": label})
    assert {p["patch_location"][0] for p in patches} == {(-2, 4)}
    assert {p["patch_location"][1][0] for p in patches} == set(range(16))
    assert all(p["label"][0, 3, 2] == 1 for p in patches)


def test_a_grid_over_a_small_volume_is_one_padded_patch() -> None:
    (patch,) = GridPatchSamplesd("image", 6, padding_mode=0)({"image": numbered(3)})
    assert patch["image"].tolist() == [[0, 0, 1, 2, 3, 0]]
    assert GridPatchSamplesd("image", 6).count((3,)) == 1


def test_a_padded_patch_keeps_the_volumes_order_of_axes_in_memory() -> None:
    volume = meta(numbered(9, 8, 7)).as_tensor()
    for patch in RandUniformPatch(5, 10, border="pad")(volume):
        assert patch.stride(1) < patch.stride(2) < patch.stride(3)
    for array in RandUniformPatch(5, 10, border="pad")(volume.numpy()):
        assert array.strides[1] < array.strides[2] < array.strides[3]
