# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch, set_track_meta
from monai.transforms import Compose, Flipd, Invertd, RandCropByLabelClassesd, RandSpatialCropSamplesd
from monai.utils import TraceKeys

from monai_patchqueue.transforms import (
    GridPatchSamplesd,
    RandLabelPatchd,
    RandUniformPatch,
    RandUniformPatchd,
    RandWeightedPatchd,
)
from tests.volumes import blobs, meta, numbered


def item(*shape: int) -> dict[str, Any]:
    return {"image": meta(numbered(*shape, channels=2)), "label": meta(blobs(*shape), "label.nii.gz")}


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, meta])
@pytest.mark.parametrize("size", [4, (12, 11, 10), 14])
def test_a_patch_owns_its_memory_and_no_more(kind: Any, size: Any) -> None:
    volume = kind(numbered(12, 11, 10))
    for patch in RandUniformPatch(size, 3, padding_mode=0)(volume):
        if isinstance(patch, np.ndarray):
            assert patch.base is None
        else:
            assert patch.untyped_storage().nbytes() == patch.numel() * patch.element_size()
            assert patch.untyped_storage().data_ptr() != volume.untyped_storage().data_ptr()
        before = np.array(volume)
        patch[...] = 0
        assert (np.asarray(volume) == before).all()


def test_a_pickled_patch_is_small() -> None:
    volume = {"image": meta(np.zeros((1, 64, 64, 64), dtype=np.float32))}
    (patch,) = RandUniformPatchd("image", 8)(volume)
    assert len(pickle.dumps(patch)) < 8**3 * 4 + 3000
    set_track_meta(False)
    try:
        (patch,) = RandUniformPatchd("image", 8)(volume)
    finally:
        set_track_meta(True)
    assert len(pickle.dumps(patch)) < 8**3 * 4 + 1500


def test_patches_keep_the_volumes_order_of_axes_in_memory() -> None:
    (patch,) = RandUniformPatch(4)(meta(numbered(9, 8, 7)))
    assert patch.stride()[1:] == (1, 4, 16)


@pytest.mark.parametrize("border", ["inside", "pad"])
def test_a_patch_knows_its_index_its_center_and_where_it_is_from(border: str) -> None:
    whole = item(12, 11, 10)
    patches = RandUniformPatchd(["image", "label"], (4, 5, 6), 7, border)(whole)
    for i, patch in enumerate(patches):
        for key in ("image", "label"):
            noted = patch[key].meta
            assert noted["patch_index"] == i
            location = noted["patch_location"]
            assert all(type(v) is int for bounds in location for v in bounds)
            assert noted["crop_center"] == tuple(a + s // 2 for (a, _), s in zip(location, (4, 5, 6), strict=True))
            start = torch.tensor([*(float(a) for a, _ in location), 1.0], dtype=torch.float64)
            assert torch.allclose(patch[key].affine[:, 3], whole[key].affine @ start)
            assert torch.equal(patch[key].affine[:, :3], whole[key].affine[:, :3])
        assert "patch_location" not in patch
    assert "patch_index" not in whole["image"].meta
    assert whole["image"].affine[0, 3] == 10
    assert whole["image"].applied_operations == []


def test_the_affine_is_the_one_of_monais_crops_in_2d_and_3d_with_any_affine() -> None:
    rng = np.random.default_rng(0)
    for volume in (
        MetaTensor(torch.rand(1, 9, 8, 7), affine=rng.random((4, 4))),
        MetaTensor(torch.rand(1, 9, 8)),
        MetaTensor(torch.rand(1, 9, 8), affine=rng.random((3, 3))),
    ):
        size = (4,) * (volume.ndim - 1)
        theirs = RandSpatialCropSamplesd("image", size, 1, random_size=False).set_random_state(0)({"image": volume})[0][
            "image"
        ]
        for ours in GridPatchSamplesd("image", size, 3)({"image": volume}):
            if (ours["image"].as_tensor() == theirs.as_tensor()).all():
                assert torch.allclose(ours["image"].affine, theirs.affine)
                break
        else:
            raise AssertionError("MONAI's patch is not in the grid")


def test_where_metadata_is_not_tracked_the_patch_says_where_it_is_from() -> None:
    plain = {"image": numbered(9, 9), "label": torch.from_numpy(blobs(9, 9))}
    (patch,) = RandUniformPatchd(["image", "label"], 4)(plain)
    (a, b), (c, d) = patch["patch_location"]
    assert (patch["image"] == plain["image"][:, a:b, c:d]).all()
    set_track_meta(False)
    try:
        (patch,) = RandUniformPatchd(["image", "label"], 4)(item(9, 9, 9))
    finally:
        set_track_meta(True)
    assert type(patch["image"]) is torch.Tensor
    assert len(patch["patch_location"]) == 3


def test_the_trace_has_the_entries_of_monais_own_crops() -> None:
    whole = item(9, 9, 9)
    ours = RandLabelPatchd(["image"], "label", 4)(whole)[0]["image"].applied_operations[-1]
    theirs = RandCropByLabelClassesd(["image"], "label", 4, num_classes=4)(whole)[0]["image"].applied_operations[-1]
    assert ours.keys() == theirs.keys()
    assert ours[TraceKeys.CLASS_NAME] == "RandLabelPatch"
    assert tuple(ours[TraceKeys.ORIG_SIZE]) == tuple(theirs[TraceKeys.ORIG_SIZE])
    crop = RandUniformPatchd("image", 4)
    with crop.cropper.trace_transform(False):
        assert crop(whole)[0]["image"].applied_operations == []


@pytest.mark.parametrize(
    "crop",
    [
        RandUniformPatchd(["image", "label"], 5, 3, "pad"),
        RandLabelPatchd(["image", "label"], "label", (4, 20, 3), 3, padding_mode="reflect"),
        RandWeightedPatchd(["image", "label"], "label", 4, 3, border="clamp"),
        GridPatchSamplesd(["image", "label"], 6, 2, True),
    ],
)
def test_inverting_a_pipeline_puts_each_patch_back_into_its_volume(crop: Any) -> None:
    whole = item(12, 11, 10)
    pipeline = Compose([Flipd(["image", "label"], spatial_axis=1), crop])
    for patch in pipeline(whole):
        location = patch["image"].meta["patch_location"]
        back = pipeline.inverse(copy.deepcopy(patch))
        inside = tuple(slice(max(a, 0), b) for a, b in location)
        for key in ("image", "label"):
            flipped = torch.zeros_like(whole[key].as_tensor())
            source = whole[key].as_tensor().flip(2)
            flipped[(slice(None), *inside)] = source[(slice(None), *inside)]
            assert torch.equal(back[key].as_tensor().to(source.dtype), flipped.flip(2))
            assert torch.allclose(back[key].affine, whole[key].affine)
            assert back[key].applied_operations == []


def test_invertd_puts_a_prediction_on_a_patch_back_after_collation() -> None:
    crop = Compose([RandUniformPatchd(["image"], 4, 2)])
    loader = DataLoader(Dataset([{"image": meta(numbered(8, 8, 8))}] * 2, crop), batch_size=2)
    batch = next(iter(loader))
    batch["pred"] = batch["image"] * 0 + 1
    undo = Invertd("pred", crop, orig_keys="image", nearest_interp=False, to_tensor=True)
    for one in decollate_batch(batch):
        pred = undo(one)["pred"]
        assert pred.shape == (1, 8, 8, 8)
        assert pred.sum() == 4**3


def test_a_copy_of_the_transform_can_invert_as_workers_have_copies() -> None:
    crop = RandUniformPatchd("image", 4)
    (patch,) = crop({"image": meta(numbered(8, 8, 8))})
    assert pickle.loads(pickle.dumps(crop)).inverse(patch)["image"].shape == (1, 8, 8, 8)
    with pytest.raises(ValueError, match="was not cut by RandUniformPatch"):
        crop.inverse({"image": meta(numbered(8, 8, 8))})


def test_patches_collate_and_decollate_as_monais_do() -> None:
    loader = DataLoader(Dataset([item(8, 8, 8)] * 3, RandUniformPatchd(["image", "label"], 4, 2)), batch_size=3)
    batch = next(iter(loader))
    assert batch["image"].shape == (6, 2, 4, 4, 4)
    assert batch["image"].is_batch
    assert [int(i) for i in batch["image"].meta["patch_index"]] == [0, 1] * 3
    assert [d["image"].meta["patch_index"] for d in decollate_batch(batch)] == [0, 1] * 3


def test_a_lazily_read_volume_is_cut_and_its_metadata_used() -> None:
    class OnDisk:
        shape, dtype = (2, 9, 8, 7), np.dtype(np.int32)

        def __init__(self) -> None:
            self.reads: list[Any] = []

        def __getitem__(self, index: Any) -> np.ndarray:
            self.reads.append(index)
            return numbered(9, 8, 7, channels=2)[index]

    volume = OnDisk()
    patches = RandUniformPatchd("image", 4, 3)({"image": volume})
    for patch in patches:
        at = (slice(None), *(slice(a, b) for a, b in patch["patch_location"]))
        assert (patch["image"] == numbered(9, 8, 7, channels=2)[at]).all()
        assert patch["image"].base is None
    assert len(volume.reads) == 3
    volume.meta = {"filename_or_obj": "big.nii", "affine": np.diag([2.0, 2, 2, 1])}  # type: ignore[attr-defined]
    (patch,) = RandLabelPatchd("image", "image", 4)({"image": volume})
    assert isinstance(patch["image"], MetaTensor)
    assert patch["image"].affine[0, 3] == 2 * patch["image"].meta["patch_location"][0][0]
    assert patch["image"].meta["filename_or_obj"] == "big.nii"
