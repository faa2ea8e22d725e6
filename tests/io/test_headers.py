# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import pickle
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import Dataset
from monai.transforms import Compose, Lambdad, LoadImage

from monai_patchqueue import LoadVolume, LoadVolumed, PatchQueueLoader, RandUniformPatchd
from monai_patchqueue.io import headers, nifti
from tests.nifti_files import AFFINE, assert_same_volume, voxels, write_nifti

SHAPE = (6, 5, 4)
KINDS = [
    {"suffix": ".nii"},
    {"suffix": ".nii.gz"},
    {"suffix": ".img"},
    {"suffix": ".nii", "endian": ">", "slope": 0.5, "inter": 3},
    {"suffix": ".nii.gz", "version": 2, "zooms": (1, 1, 1)},  # which the affine contradicts
    {"suffix": ".nii", "shape": (6, 5, 4, 3), "sform": 0},
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"simple_keys": True},
    {"prune_meta_pattern": ".*_code$", "prune_meta_sep": " "},
    {"channel_dim": 0},
    {"channel_dim": "no_channel", "dtype": None},
]


def write(folder: Path, suffix: str = ".nii", shape: tuple[int, ...] = SHAPE, **header: Any) -> str:
    return write_nifti(folder / f"a{suffix}", voxels(shape, "i2"), **header)


def by_monai(file: str, **options: Any) -> Any:
    return LoadImage("NibabelReader", ensure_channel_first=True, **options)(file)


def loaded(file: str, **options: Any) -> list[Any]:
    """Volumes of a file as they come when it is met for the first time or not, lazily or not."""
    loaders = [LoadVolume(ensure_channel_first=True, lazy_read=lazily, **options) for lazily in (True, False, True)]
    return [volume.load() if hasattr(volume := load(file), "load") else volume for load in loaders]


def spoil(meta: dict[Any, Any]) -> None:
    for value in meta.values():
        if isinstance(value, (np.ndarray, torch.Tensor)):
            value.fill_(77) if isinstance(value, torch.Tensor) else value.fill(b"7" if value.dtype.kind == "S" else 77)
    meta.clear()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_file_that_is_met_again_gives_what_load_image_gives(
    tmp_path: Path, kind: dict[str, Any], options: dict[str, Any]
) -> None:
    file = write(tmp_path, **kind)
    for _ in range(2):
        stock = by_monai(file, **options)
        for volume in loaded(file, **options):
            assert_same_volume(volume, stock)
            assert volume.spatial_ndim == stock.spatial_ndim
            spoil(volume.meta)


def test_a_npy_file_that_is_met_again_gives_what_load_image_gives(tmp_path: Path) -> None:
    file = str(tmp_path / "a.npy")
    for array in (voxels(SHAPE, "i2"), np.asfortranarray(voxels((3, 4), "f8"))):
        np.save(file, array)
        for options in ({}, {"channel_dim": 0}):
            stock = LoadImage(ensure_channel_first=True, **options)(file)
            for _ in range(2):
                volume = LoadVolume(ensure_channel_first=True, lazy_read=True, **options)(file).load()
                assert_same_volume(volume, stock)
                spoil(volume.meta)


def test_a_header_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write(tmp_path, suffix) for suffix in (".nii", ".nii.gz", ".img")]
    before = [loaded(file) for file in files]
    monkeypatch.setattr(nifti, "_read_header", None)
    for file, volumes in zip(files, before, strict=True):
        assert_same_volume(LoadVolume(ensure_channel_first=True)(file), volumes[0])
    Path(files[0]).touch()
    with pytest.raises(TypeError):
        LoadVolume(ensure_channel_first=True)(files[0])


def test_a_file_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    file, other = write(tmp_path), tmp_path / "other.nii"
    status = os.stat(file)
    for change in ("in place", "replaced", "other shape"):
        loaded(file)
        shape = (4, 5, 7) if change == "other shape" else SHAPE
        affine = AFFINE * (2 if change == "in place" else 3)
        write_nifti(other, voxels(shape, "i2", 1), affine=affine)
        if change == "replaced":
            os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
            os.replace(other, file)
        else:
            shutil.copyfile(other, file)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as rsync and cp -p leave it
        stock = by_monai(file)
        assert np.abs(stock.affine.numpy() - affine)[:3].max() == 0
        for volume in loaded(file):
            assert_same_volume(volume, stock)


def test_a_header_of_a_pair_that_changes_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path, ".img")
    loaded(file)
    write(tmp_path, ".img", slope=2, inter=1)
    for volume in loaded(file):
        assert_same_volume(volume, by_monai(file))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".img", ".npy"])
def test_a_file_that_is_gone_or_cut_short_is_an_error_though_it_was_met(tmp_path: Path, suffix: str) -> None:
    file = str(tmp_path / "a.npy") if suffix == ".npy" else write(tmp_path, suffix, (20, 20, 20))
    if suffix == ".npy":
        np.save(file, voxels((20, 20, 20), "i2"))
    load = LoadVolume(ensure_channel_first=True, lazy_read=True)
    load(file).load()
    whole = Path(file).read_bytes()
    Path(file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises((OSError, ValueError), match=r"a\.(n|img)|mmap"):
        load(file)
    Path(file).unlink()
    with pytest.raises(OSError, match="a"):
        load(file)
    Path(file).write_bytes(whole)
    load(file).load()


def test_loaders_and_threads_do_not_get_each_others_metadata(tmp_path: Path) -> None:
    files = [
        write_nifti(tmp_path / f"{i}.nii", voxels(SHAPE, "i2", i), affine=AFFINE + np.eye(4) * i) for i in range(3)
    ]
    stock = [[by_monai(file, **options) for options in OPTIONS[:4]] for file in files]

    def load(number: int) -> None:
        file, options = number % 3, number % 4
        volume = LoadVolume(ensure_channel_first=True, lazy_read=True, **OPTIONS[options])(files[file]).load()
        assert_same_volume(volume, stock[file][options])
        spoil(volume.meta)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load, range(96)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_transform_writes_into_metadata_does_not_last(tmp_path: Path, num_workers: int) -> None:
    file = write(tmp_path)

    def doubled(volume: Any) -> Any:
        volume.affine.mul_(2)
        volume.meta["pixdim"] *= 2
        return volume

    recipe = [
        LoadVolumed("image", ensure_channel_first=True, lazy_read=True),
        Lambdad("image", doubled),
        RandUniformPatchd("image", -1),
    ]
    dataset = Dataset([{"image": file}], Compose(recipe))
    with PatchQueueLoader(dataset, num_workers, batch_size=1, batch_unit="patch", seed=0) as loader:
        epochs = [batch["image"] for _ in range(3) for batch in loader]
    for image in epochs:
        np.testing.assert_array_equal(image.affine[0], AFFINE * 2)
        np.testing.assert_array_equal(image.meta["pixdim"][0, 1:4], [3, 4, 6])


def test_loaders_do_not_carry_what_is_kept(tmp_path: Path) -> None:
    load = LoadVolume(ensure_channel_first=True, lazy_read=True)
    fresh = pickle.dumps(load)
    load(write(tmp_path))
    assert pickle.dumps(load) == fresh


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    loaded(write(tmp_path))
    files = [write_nifti(tmp_path / f"{i}.nii", voxels(SHAPE, "i2")) for i in range(50)]
    load = LoadVolume(ensure_channel_first=True, lazy_read=True)
    tracemalloc.start()
    try:
        for file in files:
            load(file)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / 50 < 20 << 10
    assert headers._kept.cache_info().maxsize == headers.KEPT_HEADERS
