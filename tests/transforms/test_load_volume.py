# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import Dataset, MetaTensor, set_track_meta
from monai.transforms import Compose, EnsureChannelFirstd, LoadImage, LoadImaged

from monai_patchqueue import (
    FastNiftiReader,
    GridPatchSamplesd,
    LazyMetaTensor,
    LoadVolume,
    LoadVolumed,
    PatchQueueLoader,
    RandLabelPatch,
    RandLabelPatchd,
    RandUniformPatchd,
    RandWeightedPatchd,
)
from tests.nifti_files import assert_same_meta, assert_same_volume, voxels, write_nifti
from tests.volumes import blobs

KEYS = ["image", "label"]
SHAPE = (20, 19, 18)


@pytest.fixture(params=[".nii.gz", ".nii"])
def item(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    return case(tmp_path, request.param)


def case(folder: Path, suffix: str, seed: int = 0) -> dict[str, str]:
    image = voxels(SHAPE, "i2", seed)
    return {
        "image": write_nifti(folder / f"image_{seed}{suffix}", image, slope=0.1, inter=-3),
        "label": write_nifti(folder / f"label_{seed}{suffix}", blobs(*SHAPE, seed=seed)[0]),
    }


def assert_same_item(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    assert list(ours) == list(stock)
    for key, value in stock.items():
        if isinstance(value, torch.Tensor):
            assert_same_volume(ours[key], value)
        else:
            assert_same_meta(ours[key], value)


@pytest.mark.parametrize(("ours", "stock"), [(LoadVolume, LoadImage), (LoadVolumed, LoadImaged)])
def test_it_has_the_arguments_of_monais(ours: Any, stock: Any) -> None:
    ours, theirs = inspect.signature(ours.__init__).parameters, inspect.signature(stock.__init__).parameters
    assert [p for p in ours if p not in ("lazy_read", "mmap")] == list(theirs)
    assert all(ours[name].default == parameter.default for name, parameter in theirs.items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ensure_channel_first": True},
        {"dtype": None},
        {"dtype": "int16"},
        {"dtype": torch.float64, "simple_keys": True},
        {"image_only": False},
        {"image_only": False, "meta_keys": ["a", "b"], "simple_keys": True},
        {"image_only": False, "meta_key_postfix": "info"},
        {"prune_meta_pattern": ".*_code$", "prune_meta_sep": " "},
        {"reader": "NibabelReader"},
        {"reader": FastNiftiReader},
        {"channel_dim": "no_channel", "ensure_channel_first": True},
        {"expanduser": False},
    ],
)
def test_it_fits_in_the_place_of_load_imaged(item: dict[str, str], options: dict[str, Any]) -> None:
    assert_same_item(LoadVolumed(KEYS, **options)(item), LoadImaged(KEYS, **options)(item))


def test_other_formats_and_lists_of_files_are_read_by_monai(tmp_path: Path) -> None:
    files = [write_nifti(tmp_path / f"{i}.nii.gz", voxels((4, 5, 6), "i2", i)) for i in range(2)]
    np.save(tmp_path / "a.npy", np.ones((3, 4)))
    for source in (files, str(tmp_path / "a.npy"), tmp_path / "a.npy"):
        assert_same_volume(LoadVolume()(source), LoadImage()(source))
    assert_same_volume(LoadVolume()(files[0], FastNiftiReader()), LoadImage()(files[0]))


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_nifti(tmp_path / "a.nii.gz", voxels((4, 5, 6), "i2"))
    assert_same_volume(LoadVolume()(Path("~/a.nii.gz")), LoadImage()("~/a.nii.gz"))


def test_missing_keys_and_metadata_in_the_way_are_errors_as_in_monai(item: dict[str, str]) -> None:
    with pytest.raises(KeyError, match="w"):
        LoadVolumed([*KEYS, "w"])(item)
    assert list(LoadVolumed([*KEYS, "w"], allow_missing_keys=True)(item)) == KEYS
    with pytest.raises(KeyError, match="overwriting"):
        LoadVolumed("image", image_only=False)({**item, "image_meta_dict": 1})


def test_without_metadata_it_gives_tensors(item: dict[str, str]) -> None:
    set_track_meta(False)
    try:
        for lazy_read in (False, True):
            loaded = LoadVolumed(KEYS, ensure_channel_first=True, lazy_read=lazy_read)(item)
            assert_same_item(loaded, LoadImaged(KEYS, ensure_channel_first=True)(item))
    finally:
        set_track_meta(True)


def test_voxels_stay_in_the_files_order(item: dict[str, str]) -> None:
    image = LoadVolumed(KEYS, ensure_channel_first=True)(item)["image"]
    assert image.stride()[1:] == (1, 20, 380)
    channels_last = LoadVolume(ensure_channel_first=True)
    file = write_nifti(Path(item["image"]).with_name("b.nii.gz"), voxels((4, 5, 6, 3), "i2"))
    assert channels_last(file).stride() == (120, 1, 4, 20)


def test_a_config_finds_it_by_its_name(item: dict[str, str]) -> None:
    parser = ConfigParser({"load": {"_target_": "monai_patchqueue.LoadVolumeD", "keys": KEYS, "dtype": "$None"}})
    loaded = parser.get_parsed_content("load")(item)
    assert loaded["label"].dtype == torch.uint8


CROPS = [
    RandUniformPatchd(KEYS, 8, 3),
    RandUniformPatchd(KEYS, (8, 30, -1), 3, padding_mode="reflect"),
    RandLabelPatchd(KEYS, "label", 8, 4, "balanced"),
    RandWeightedPatchd(KEYS, "label", 8, 3, border="pad"),
    GridPatchSamplesd(KEYS, 12, overlap=0.25),
]


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: f"{type(crop).__name__} {crop.cropper.border}")
@pytest.mark.parametrize("dtype", [np.float32, None])
@pytest.mark.parametrize("mmap", [True, False])
def test_lazily_read_volumes_give_the_patches_of_stock_ones(
    item: dict[str, str], crop: Any, dtype: Any, mmap: bool
) -> None:
    lazily = LoadVolumed(KEYS, dtype=dtype, ensure_channel_first=True, lazy_read=True, mmap=mmap)
    loaded = lazily(item)
    assert all(isinstance(loaded[key], LazyMetaTensor) for key in KEYS)
    eager = LoadVolumed(KEYS, dtype=dtype, ensure_channel_first=True)
    stock = Compose([LoadImaged(KEYS, dtype=dtype), EnsureChannelFirstd(KEYS)])(item)
    assert_same_meta(loaded["image"].meta, stock["image"].meta)
    expected = Compose([eager, crop]).set_random_state(0)(item)
    patches = Compose([lazily, crop]).set_random_state(0)(item)
    assert len(patches) == len(expected)
    for ours, other in zip(patches, expected, strict=True):
        assert isinstance(ours["image"], MetaTensor)
        assert_same_item(ours, other)
        region = tuple(slice(a, b) for a, b in ours["image"].meta["patch_location"])
        if all(s.start >= 0 and s.stop <= n for s, n in zip(region, SHAPE, strict=True)):
            assert torch.equal(ours["image"].as_tensor(), stock["image"].as_tensor()[(slice(None), *region)])


def test_lazily_read_arrays_work_as_label_of_the_array_transform(item: dict[str, str]) -> None:
    load = LoadVolume(ensure_channel_first=True, lazy_read=True)
    image, label = load(item["image"]), load(item["label"])
    patches = RandLabelPatch(8, 5)(image, label=label)
    for patch in patches:
        at = tuple(patch.meta["crop_center"])
        assert label[(0, *at)] > 0
        np.testing.assert_array_equal(patch[0, 4, 4, 4], image[(0, *at)])


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", ["f4", "u1", "u2", "?", ">i2"])
def test_npy_files_are_read_lazily(tmp_path: Path, order: Any, dtype: str) -> None:
    array = (np.arange(504).reshape(7, 8, 9) % 100).astype(dtype)
    np.save(tmp_path / "a.npy", np.asarray(array, order=order))
    np.save(tmp_path / "channels.npy", np.asarray(np.stack([array, array]), order=order))
    for file, kwargs in (("a.npy", {}), ("channels.npy", {"channel_dim": 0})):
        for mmap in (True, False):
            lazily = LoadVolume(ensure_channel_first=True, lazy_read=True, mmap=mmap, **kwargs)(tmp_path / file)
            assert isinstance(lazily, LazyMetaTensor)
            assert_same_volume(lazily.load(), LoadImage(ensure_channel_first=True, **kwargs)(tmp_path / file))


def test_what_cannot_be_read_lazily_is_read_whole(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.ones((7, 8, 9)))
    np.save(tmp_path / "a.npy", np.ones((7, 8, 9), np.complex64))
    for file, dtype in (("a.npz", np.float32), ("a.npy", None)):
        volume = LoadVolume(dtype=dtype, ensure_channel_first=True, lazy_read=True)(tmp_path / file)
        assert_same_volume(volume, LoadImage(dtype=dtype, ensure_channel_first=True)(tmp_path / file))


def test_lazy_reading_refuses_what_it_cannot_keep() -> None:
    with pytest.raises(ValueError, match="give ensure_channel_first=True"):
        LoadVolumed("image", lazy_read=True)
    with pytest.raises(ValueError, match="reads whole volumes"):
        LoadVolumed("image", "ITKReader", ensure_channel_first=True, lazy_read=True)


def test_it_is_pickled_with_its_settings(item: dict[str, str]) -> None:
    load = LoadVolumed(KEYS, ensure_channel_first=True, lazy_read=True)
    assert_same_volume(pickle.loads(pickle.dumps(load))(item)["image"].load(), load(item)["image"].load())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("lazy_read", [False, True])
def test_the_queue_draws_the_same_batches_as_from_load_imaged(tmp_path: Path, workers: int, lazy_read: bool) -> None:
    files = [case(tmp_path, suffix, seed) for seed, suffix in enumerate([".nii", ".nii.gz", ".nii"])]
    ours = LoadVolumed(KEYS, ensure_channel_first=True, lazy_read=lazy_read)
    stock = LoadImaged(KEYS, ensure_channel_first=True)
    batches = []
    for load, n in ((ours, workers), (stock, 0)):
        volumes = Dataset(files, Compose([load, RandUniformPatchd(KEYS, 8, 4)]))
        with PatchQueueLoader(volumes, n, batch_size=3, batch_unit="patch", shuffle=True, seed=1) as loader:
            batches.append(list(loader))
    assert len(batches[0]) == len(batches[1]) == 4
    for a, b in zip(*batches, strict=True):
        assert all(torch.equal(a[key].as_tensor(), b[key].as_tensor()) for key in KEYS)
        assert a["image"].meta["filename_or_obj"] == b["image"].meta["filename_or_obj"]


def test_a_grids_patches_are_counted_by_the_files_headers(tmp_path: Path) -> None:
    files = [case(tmp_path, ".nii.gz")]
    grid = Compose([LoadVolumed(KEYS, ensure_channel_first=True), GridPatchSamplesd(KEYS, 10)])
    with PatchQueueLoader(Dataset(files, grid), batch_size=4, batch_unit="patch") as loader:
        assert len(loader) == 2
