# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import Dataset, MetaTensor, set_track_meta
from monai.transforms import Compose, LoadImaged, ScaleIntensityd

from monai_patchqueue import (
    ChunkedDataset,
    LoadVolume,
    LoadVolumed,
    PatchQueueLoader,
    RandLabelPatchd,
    RandUniformPatchd,
)
from monai_patchqueue.data.folder import as_dataset
from monai_patchqueue.data.shapes import spatial_shape
from monai_patchqueue.io.lazy import LazyVolume
from monai_patchqueue.io.scaling import Scaling
from monai_patchqueue.io.zarr_arrays import open_zarr
from tests.nifti_files import voxels
from tests.volumes import blobs

zarr = pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
from tests.zarr_stores import FORMATS, axes, write_image  # noqa: E402

KEYS = ["image", "label"]
SHAPE = (40, 37, 34)
"""Of volumes, x, y, z."""
SPACING, ORIGIN = (0.5, 0.75, 1.5), (-10.0, 20.0, 30.0)
AFFINE = np.array([[0.5, 0, 0, -10], [0, 0.75, 0, 20], [0, 0, 1.5, 30], [0, 0, 0, 1]])


def opened(file: Path | str, channel_dim: int | None = None) -> LazyVolume:
    """The volume in a store, as an array-like."""
    stored, layout, _ = open_zarr(str(file), channel_dim)
    meta = {"affine": torch.from_numpy(layout.affine)}
    return LazyVolume(stored, Scaling(), meta, 0 if layout.has_channels else None)


def case(folder: Path, version: str, seed: int) -> tuple[dict[str, str], dict[str, str]]:
    """An image and its label, in an OME-Zarr store and in NIfTI files."""
    arrays = {"image": voxels(SHAPE, "i2", seed), "label": blobs(*SHAPE, seed=seed)[0]}
    where = {"spacing": SPACING[::-1], "origin": ORIGIN[::-1]}
    store = folder / f"case_{seed}.ome.zarr"
    in_zarr = {"image": write_image(store, arrays["image"].T, version, **where)}
    in_zarr["label"] = write_image(store / "labels" / "organ", arrays["label"].T, version, **where)
    in_nifti = {key: str(folder / f"{key}_{seed}.nii.gz") for key in arrays}
    for key, array in arrays.items():
        nib.save(nib.Nifti1Image(array, AFFINE), in_nifti[key])
    return in_zarr, in_nifti


def patches(files: list[dict[str, str]], load: Any, **options: Any) -> list[tuple[Any, ...]]:
    """All that the loader gives in an epoch, as bytes."""
    cut = RandLabelPatchd(KEYS, "label", (16, 13, 11), num_samples=4, label_probabilities="balanced")
    given = []
    with PatchQueueLoader(
        Dataset(files, Compose([load, cut])), batch_size=4, batch_unit="patch", shuffle=True, seed=3, **options
    ) as loader:
        for batch in loader:
            for key in KEYS:
                voxels, affine = batch[key].as_tensor().numpy(), batch[key].affine.numpy()
                given.append((voxels.dtype, voxels.shape, voxels.tobytes(), affine.tobytes()))
    return given


@pytest.mark.parametrize("version", FORMATS)
def test_patches_are_bit_for_bit_those_of_a_nifti_file(tmp_path: Path, version: str) -> None:
    in_zarr, in_nifti = zip(*(case(tmp_path, version, seed) for seed in range(2)), strict=True)
    lazily = LoadVolumed(KEYS, ensure_channel_first=True, lazy_read=True)
    expected = patches(list(in_nifti), LoadVolumed(KEYS, ensure_channel_first=True))
    assert len(expected) == 4
    for workers in {}, {"num_workers": 2}, {"num_workers": 2, "worker_type": "thread"}:
        assert patches(list(in_zarr), lazily, **workers) == expected


@pytest.mark.parametrize("version", FORMATS)
def test_whole_volumes_are_those_of_a_nifti_file(tmp_path: Path, version: str) -> None:
    in_zarr, in_nifti = case(tmp_path, version, 0)
    for first in (True, False):
        ours = LoadVolumed(KEYS, ensure_channel_first=first)(in_zarr)
        theirs = LoadImaged(KEYS, ensure_channel_first=first)(in_nifti)
        for key in KEYS:
            assert type(ours[key]) is MetaTensor
            assert ours[key].dtype == theirs[key].dtype == torch.float32
            assert torch.equal(ours[key].as_tensor(), theirs[key].as_tensor())
            assert np.array_equal(ours[key].affine, theirs[key].affine)
            assert ours[key].meta["filename_or_obj"] == in_zarr[key]
    volume, meta = LoadVolume(image_only=False, dtype=None)(in_zarr["image"])
    assert volume.dtype == torch.int16
    assert meta["spatial_shape"].tolist() == list(SHAPE)


@pytest.mark.parametrize("names", ["czyx", "tczyx", "zyxc"])
def test_channels_come_first(tmp_path: Path, names: str) -> None:
    array = voxels(tuple({"t": 1, "c": 3, "z": 12, "y": 13, "x": 14}[name] for name in names), "u2")
    file = write_image(tmp_path / "a.zarr", array, names=names, chunk=8)
    expected = array.transpose([names.index(name) for name in "cxyz" + "t" * ("t" in names)]).reshape(3, 14, 13, 12)
    volume = opened(file)
    assert np.array_equal(volume[1:, 2:9, :, 3:], expected[1:, 2:9, :, 3:])
    whole = LoadVolume(dtype=None)(file)
    assert whole.dtype == torch.int32
    assert np.array_equal(whole.numpy(), expected)
    assert whole.meta["original_channel_dim"] == 0


@pytest.mark.parametrize("version", FORMATS)
def test_levels_are_named_behind_the_store(tmp_path: Path, version: str) -> None:
    array = voxels((20, 21, 22), "f4")
    file = write_image(tmp_path / "a.ome.zarr", array, version, spacing=(3, 2, 1), origin=(6, 5, 4))
    load = LoadVolume(ensure_channel_first=True)
    first, second = (load(Path(file) / level) for level in "01")
    assert np.array_equal(first[0], array.T)
    assert np.array_equal(second[0], array.T[::2, ::2, ::2])
    assert np.array_equal(first.affine, [[1, 0, 0, 4], [0, 2, 0, 5], [0, 0, 3, 6], [0, 0, 0, 1]])
    assert np.array_equal(second.affine, [[2, 0, 0, 4], [0, 4, 0, 5], [0, 0, 6, 6], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("<i2", {"zarr_format": 2}),
        (">i2", {"zarr_format": 2, "order": "F"}),
        (">f4", {"zarr_format": 3}),
        ("bool", {"zarr_format": 3}),
        ("u1", {"zarr_format": 3, "shards": (16, 16, 16)}),
        ("f8", {"zarr_format": 3, "compressors": None}),
    ],
)
def test_regions_are_those_that_zarr_reads(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    array = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 99, (30, 21, 18)).astype(dtype)
    stored = zarr.create_array(str(tmp_path / "a.zarr"), shape=array.shape, dtype=dtype, chunks=(8, 8, 8), **options)
    stored[:] = array
    volume = opened(tmp_path / "a.zarr")
    assert volume.shape == (1, 30, 21, 18)
    assert volume.dtype == np.dtype(dtype).newbyteorder("=")
    for region in np.s_[3:20, 5:, :11], np.s_[:, 20:, 3], np.s_[::2, ::-1, 4:4], np.s_[-3:, 1:2, 2:3]:
        assert np.array_equal(volume[(0, *region)], array[region])
    assert np.array_equal(LoadVolume(dtype=None)(tmp_path / "a.zarr").numpy(), array)


def test_a_plain_array_may_name_its_axes_or_be_told_the_channels(tmp_path: Path) -> None:
    array = voxels((4, 5, 6, 2), "i2")
    options = {"shape": array.shape, "dtype": "i2"}
    zarr.create_array(str(tmp_path / "named.zarr"), **options, dimension_names=["z", "y", "x", "c"])[:] = array
    xarrays = zarr.create_array(str(tmp_path / "xarrays.zarr"), **options, zarr_format=2)
    xarrays.attrs["_ARRAY_DIMENSIONS"] = ["z", "y", "x", "c"]
    xarrays[:] = array
    for name in ("named", "xarrays"):
        assert np.array_equal(opened(tmp_path / f"{name}.zarr")[:], array.T)
    zarr.create_array(str(tmp_path / "told.zarr"), **options, dimension_names=["a", "b", "c", "d"])[:] = array
    assert np.array_equal(opened(tmp_path / "told.zarr", -1)[:], np.moveaxis(array, -1, 0))
    whole = LoadVolume(ensure_channel_first=True, channel_dim=-1, dtype=None)(tmp_path / "told.zarr")
    assert np.array_equal(whole.numpy(), np.moveaxis(array, -1, 0))
    assert opened(tmp_path / "told.zarr").shape == (1, 4, 5, 6, 2)
    with pytest.raises(
        ValueError, match=re.escape("told.zarr': channel_dim is 4, and the array has shape [4, 5, 6, 2]")
    ):
        LoadVolume(channel_dim=4)(tmp_path / "told.zarr")


@pytest.mark.parametrize("version", FORMATS)
def test_only_the_chunks_that_a_patch_touches_are_read(tmp_path: Path, version: str) -> None:
    array = voxels((48, 48, 48), "i2")
    file = write_image(tmp_path / "a.zarr", array, version, chunk=16)
    needed = {(z, y, x) for z in (0, 1) for y in (1,) for x in (1, 2)}
    spoiled = 0
    for path in (tmp_path / "a.zarr" / "0").rglob("*"):
        place = tuple(map(int, re.findall(r"\d+", str(path.relative_to(tmp_path / "a.zarr" / "0")))))
        if path.is_file() and len(place) == 3 and place not in needed:
            path.write_bytes(b"no chunk")
            spoiled += 1
    assert spoiled == 27 - len(needed)
    assert np.array_equal(opened(file)[0, 20:40, 16:32, 10:20], array[10:20, 16:32, 20:40].T)
    with pytest.raises(OSError, match=re.escape(f"{file!r} cannot be read at [[0, 48], [0, 48], [0, 48]]")):
        opened(file)[()]


def test_a_volume_that_was_read_from_crosses_to_other_processes(tmp_path: Path) -> None:
    array = voxels((20, 21, 22), "i2")
    volume = opened(write_image(tmp_path / "a.zarr", array))
    assert np.array_equal(volume[0, 3:5], array.T[3:5])
    assert np.array_equal(pickle.loads(pickle.dumps(volume))[0], array.T)
    if "fork" in get_all_start_methods():
        with get_context("fork").Pool(1) as pool:
            assert np.array_equal(pool.apply_async(volume.__getitem__, (0,)).get(timeout=60), array.T)


def test_without_tracked_metadata_there_are_tensors(tmp_path: Path) -> None:
    array = voxels((6, 7, 8), "i2")
    file = write_image(tmp_path / "a.zarr", array)
    set_track_meta(False)
    try:
        volume = LoadVolume(ensure_channel_first=True, lazy_read=True)(file)
    finally:
        set_track_meta(True)
    assert type(volume) is torch.Tensor
    assert np.array_equal(volume.numpy()[0], array.T)


def test_the_store_prepares_volumes_from_zarr(tmp_path: Path) -> None:
    files, _ = case(tmp_path, "0.5", 0)
    load = LoadVolumed(KEYS, ensure_channel_first=True)
    recipe = Compose([load, ScaleIntensityd("image"), RandUniformPatchd(KEYS, 16, num_samples=2)])
    expected = Dataset([files], recipe.set_random_state(0))[0]
    given = ChunkedDataset([files], recipe.set_random_state(0), tmp_path / "store")[0]
    for ours, theirs in zip(given, expected, strict=True):
        for key in KEYS:
            assert torch.equal(ours[key].as_tensor(), theirs[key].as_tensor())
            assert np.array_equal(ours[key].affine, theirs[key].affine)


def test_the_store_prepares_a_level_again_when_its_groups_metadata_change(tmp_path: Path) -> None:
    level = {"image": write_image(tmp_path / "a.zarr", voxels((20, 21, 22), "i2")) + "/1"}
    recipe = Compose([LoadVolumed("image", ensure_channel_first=True), RandUniformPatchd("image", 4)])
    spacings = []
    for spacing in (1, 3):
        write_image(tmp_path / "a.zarr", voxels((20, 21, 22), "i2"), spacing=[spacing] * 3)
        (patch,) = ChunkedDataset([level], recipe, tmp_path / "store")[0]
        spacings.append(patch["image"].pixdim.tolist())
    assert spacings == [[2, 2, 2], [6, 6, 6]]


def test_the_shape_is_known_without_reading_voxels(tmp_path: Path) -> None:
    file = write_image(tmp_path / "a.zarr", voxels((2, 20, 21, 22), "i2"), names="czyx")
    before = [LoadVolumed("image", ensure_channel_first=True)]
    assert spatial_shape(file, before) == (22, 21, 20)
    assert spatial_shape(Path(file) / "1", before) == (11, 11, 10)
    zarr.create_array(str(tmp_path / "plain.zarr"), shape=(2, 20, 21, 22), dtype="i2")
    with pytest.raises(ValueError, match="does not say which of its axes is that of the channels"):
        spatial_shape(tmp_path / "plain.zarr", before)


def test_a_store_in_a_folder_of_data_is_one_volume(tmp_path: Path) -> None:
    stores = [write_image(tmp_path / name, voxels((6, 7, 8), "i2")) for name in ("a.zarr", "more/b.ome.zarr")]
    (tmp_path / "c.txt").touch()
    dataset = as_dataset(tmp_path, LoadVolumed("image"), lambda path: path.suffix == ".zarr")
    assert [item["image"].meta["filename_or_obj"] for item in dataset] == stores
    assert [item["image"].shape for item in dataset] == [(8, 7, 6)] * 2


def without(name: str) -> Callable[[Path], None]:
    return lambda store: os.remove(store / name)


def with_metadata(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(store: Path) -> None:
        content = json.loads((store / "zarr.json").read_text())
        change(content["attributes"]["ome"]["multiscales"][0])
        (store / "zarr.json").write_text(json.dumps(content))

    return edit


def cut_short(name: str) -> Callable[[Path], None]:
    return lambda store: (store / name).write_bytes((store / name).read_bytes()[:50])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (without("zarr.json"), ValueError, "is neither array nor group: expected zarr.json (Zarr 3)"),
        (without("0/zarr.json"), ValueError, "0' is neither array nor group"),
        (lambda store: os.rename(store / "0", store / "9"), FileNotFoundError, "0' is not there: "),
        (cut_short("zarr.json"), OSError, "cannot be read (JSONDecodeError"),
        (cut_short("0/zarr.json"), OSError, "0' cannot be read (JSONDecodeError"),
        (cut_short("0/c/0/0/0"), OSError, "cannot be read at [[0, 20], [0, 21], [0, 22]] of [20, 21, 22] ("),
        (
            with_metadata(lambda image: image.pop("axes")),
            ValueError,
            "'multiscales' of version 0.5 cannot be understood",
        ),
        (
            with_metadata(lambda image: image.update(axes=["z", "y", "x"])),
            ValueError,
            "as in OME-Zarr 0.4 or 0.5; conv",
        ),
        (with_metadata(lambda image: image["datasets"].clear()), ValueError, "'multiscales' of version 0.5 cannot be"),
        (with_metadata(lambda image: image.update(axes=axes("tzyx"))), ValueError, "expected a name for each axis"),
    ],
)
def test_a_broken_store_is_an_error_that_names_it(
    tmp_path: Path, spoil: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    store = tmp_path / "a.ome.zarr"
    write_image(store, voxels((20, 21, 22), "i2"))
    spoil(store)
    with pytest.raises(error, match=f"(?s){re.escape(str(store))}.*{re.escape(message)}"):
        LoadVolume()(store)


def test_what_is_no_volume_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    for name in ("ct", "pet"):
        group.create_group(name)
    with pytest.raises(
        ValueError, match=re.escape("it is a group without a multiscale image; name what is to be read")
    ):
        LoadVolume()(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match=re.escape("it has ['ct', 'pet']")):
        LoadVolume()(tmp_path / "a.zarr")
    with pytest.raises(FileNotFoundError, match=re.escape("mr' is not there: ")):
        LoadVolume()(tmp_path / "a.zarr" / "mr")
    zarr.create_array(str(tmp_path / "b.zarr"), shape=(4, 4, 4), dtype="complex64")
    with pytest.raises(ValueError, match=r"b\.zarr': its dtype is complex64: expected integers, floats or booleans"):
        LoadVolume()(tmp_path / "b.zarr")
    with pytest.raises(ValueError, match="there are 5 time points"):
        LoadVolume()(write_image(tmp_path / "c.zarr", voxels((5, 6, 7, 8), "i2"), names="tzyx"))


def test_without_the_package_zarr_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_image(tmp_path / "a.zarr", voxels((6, 7, 8), "i2"))
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'monai_patchqueue[zarr]'")):
        LoadVolume()(file)
