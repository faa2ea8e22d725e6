# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Flipd, LazyTrait, Rotate90d, Spacingd, Zoomd
from monai.transforms.traits import MultiSampleTrait

from monai_patchqueue.transforms import (
    GridPatchSamplesd,
    RandLabelPatch,
    RandLabelPatchd,
    RandUniformPatch,
    RandUniformPatchd,
    RandWeightedPatchd,
)
from tests.volumes import blobs, meta

KEYS = ["image", "label"]
CROPS = [
    RandUniformPatchd(KEYS, 6, 4),
    RandUniformPatchd(KEYS, 6, 4, border="pad", padding_mode="edge"),
    RandLabelPatchd(KEYS, "label", (5, 6, -1), 4, "balanced"),
    RandWeightedPatchd(KEYS, "w", 6, 4),
    GridPatchSamplesd(KEYS, 6),
]


def item() -> dict[str, Any]:
    label = blobs(16, 15, 14)
    image = np.random.default_rng(0).random((2, 16, 15, 14)).astype(np.float32)
    return {"image": meta(image), "label": meta(label.astype(np.float32)), "w": meta(label.astype(np.float32))}


NEAREST = {"label": {"mode": "nearest"}, "w": {"mode": "nearest"}}
"""MONAI's lazy resampling forgets the modes that its transforms were given."""

BEFORE = [
    [],
    [Flipd([*KEYS, "w"], spatial_axis=0), Rotate90d([*KEYS, "w"], spatial_axes=(0, 1))],
    [Spacingd([*KEYS, "w"], (1.7, 2.6, 4.3), mode=["bilinear", "nearest", "nearest"])],
]


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("crop", CROPS)
def test_a_lazy_pipeline_gives_the_patches_of_an_eager_one(crop: Any, before: list[Any]) -> None:
    eager = Compose([*before, crop]).set_random_state(3)(item())
    lazy = Compose([*before, crop], lazy=True, overrides=NEAREST).set_random_state(3)(item())
    assert len(eager) == len(lazy)
    for a, b in zip(eager, lazy, strict=True):
        for key in KEYS:
            assert a[key].shape == b[key].shape
            assert not b[key].pending_operations
            assert a[key].meta["patch_location"] == b[key].meta["patch_location"]
            assert a[key].meta["crop_center"] == b[key].meta["crop_center"]
            assert torch.allclose(a[key].affine, b[key].affine)
            assert torch.allclose(a[key].as_tensor().float(), b[key].as_tensor().float(), atol=1e-5)


@pytest.mark.parametrize("crop", [CROPS[0], CROPS[1], CROPS[4], RandWeightedPatchd(KEYS, "w", 6, 4)])
def test_a_lazy_zoom_before_a_crop_gives_the_same_patches(crop: Any) -> None:
    zoom = Zoomd([*KEYS, "w"], 1.3, mode="bilinear", keep_size=False)
    flat = {**item(), "w": meta(np.ones((1, 16, 15, 14), np.float32))}
    eager = Compose([zoom, crop]).set_random_state(3)(dict(flat))
    lazy = Compose([zoom, crop], lazy=True).set_random_state(3)(dict(flat))
    for a, b in zip(eager, lazy, strict=True):
        assert torch.allclose(a["image"].as_tensor(), b["image"].as_tensor(), atol=1e-5)
        assert torch.allclose(a["image"].affine, b["image"].affine)


@pytest.mark.parametrize("crop", [RandLabelPatchd(KEYS, "label", 6, 4), *CROPS[:2], *CROPS[3:]])
def test_pending_operations_are_applied_without_a_pipeline_too(crop: Any) -> None:
    pending = Spacingd([*KEYS, "w"], (1.7, 2.6, 4.3), mode="nearest")(item(), lazy=True)
    shape = pending["image"].peek_pending_shape()
    assert tuple(pending["image"].shape[1:]) != tuple(shape)
    for patch in crop(pending):
        assert not patch["image"].pending_operations
        assert patch["image"].applied_operations[-1]["orig_size"] == tuple(shape)
    assert len(pending["image"].pending_operations) == 1


def test_lazy_crops_leave_their_operation_pending_and_the_voxels_uncut() -> None:
    for patch in RandUniformPatchd(KEYS, 6, 2, lazy=True)(item()):
        assert patch["image"].shape == (2, 16, 15, 14)
        assert patch["image"].peek_pending_shape() == (6, 6, 6)
        assert patch["image"].meta["patch_index"] in (0, 1)


def test_lazy_is_monais_trait_and_the_call_overrides_the_constructor() -> None:
    crop = RandUniformPatchd("image", 4, lazy=True)
    assert isinstance(crop, LazyTrait)
    assert isinstance(crop, MultiSampleTrait)
    assert crop.lazy
    assert crop.cropper.lazy
    assert crop(item(), lazy=False)[0]["image"].shape == (2, 4, 4, 4)
    crop.lazy = False
    assert not crop.cropper.lazy
    assert not RandUniformPatchd("image", 4).requires_current_data
    assert RandLabelPatchd("image", "label", 4).requires_current_data
    assert RandWeightedPatchd("image", "w", 4).requires_current_data


def test_array_transforms_are_lazy_too() -> None:
    whole = item()
    (patch,) = RandUniformPatch(4, lazy=True)(whole["image"])
    assert patch.peek_pending_shape() == (4, 4, 4)
    (patch,) = RandLabelPatch(4)(whole["image"], label=whole["label"], lazy=True)
    assert isinstance(patch, MetaTensor)
    assert patch.peek_pending_shape() == (4, 4, 4)


def test_what_cannot_be_pending_is_cut_at_once() -> None:
    plain = {"image": torch.rand(1, 9, 9)}
    assert RandUniformPatchd("image", 4, lazy=True)(plain)[0]["image"].shape == (1, 4, 4)
