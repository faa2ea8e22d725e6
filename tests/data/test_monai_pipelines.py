# SPDX-License-Identifier: Apache-2.0
"""Pipelines as they are written for MONAI's ``DataLoader``, behind the queue without a change."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, Dataset, PersistentDataset, list_data_collate
from monai.data.utils import worker_init_fn as monai_worker_init_fn
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandCropByLabelClassesd,
    RandCropByPosNegLabeld,
    RandSpatialCropd,
    RandWeightedCropd,
)

from monai_patchqueue import PatchQueueLoader
from tests.volumes import blobs, numbered

SHAPE, SIZE = (24, 20, 18), (8, 8, 8)
KEYS = ["image", "label", "weights"]
# Oblique, left-handed.
AFFINE = np.array([[-1.9, 0.3, 0.1, 30], [0.3, 1.6, -0.2, -20], [0.1, 0.2, 2.4, 5], [0, 0, 0, 1]])
VOLUMES = 3

CROPS: dict[str, tuple[int, Callable[[], Any]]] = {
    "RandCropByPosNegLabeld": (2, lambda: RandCropByPosNegLabeld(KEYS, "label", SIZE, num_samples=2)),
    "RandCropByLabelClassesd": (
        2,
        lambda: RandCropByLabelClassesd(KEYS, "label", SIZE, [1, 2, 1, 1], num_classes=4, num_samples=2),
    ),
    "RandSpatialCropd": (1, lambda: RandSpatialCropd(KEYS, SIZE, random_size=False)),
    "RandWeightedCropd": (2, lambda: RandWeightedCropd(KEYS, "weights", SIZE, 2)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Images whose voxels hold their own number, labels and weight maps."""
    folder = tmp_path_factory.mktemp("pipelines")
    records = []
    for case in range(VOLUMES):
        label = blobs(*SHAPE, seed=case)[0]
        arrays = {
            "image": numbered(*SHAPE)[0] + 10000 * case,
            "label": label,
            "weights": (label > 0).astype(np.float32),
        }
        records.append({key: str(folder / f"{key}_{case}.nii.gz") for key in KEYS})
        for key, array in arrays.items():
            nib.save(nib.Nifti1Image(array, AFFINE), records[-1][key])
    return records


def make_dataset(kind: str, files: list[dict[str, str]], crop: Any, lazy: bool | None, folder: Path) -> Dataset:
    transforms = Compose(
        [LoadImaged(KEYS), EnsureChannelFirstd(KEYS), Orientationd(KEYS, "RAS", labels=None), crop], lazy=lazy
    )
    if kind == "CacheDataset":
        return CacheDataset(files, transforms, progress=False)
    if kind == "PersistentDataset":
        # Its files keep no metadata unless told to.
        return PersistentDataset(files, transforms, folder, track_meta=True, weights_only=False)
    return Dataset(files, transforms)


def structure(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        key: (type(value), value.dtype, tuple(value.shape), sorted(map(str, value.meta)), value.affine.shape)
        for key, value in batch.items()
        if isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("kind", ["Dataset", "CacheDataset", "PersistentDataset"])
@pytest.mark.parametrize("crop", CROPS)
def test_patches_are_where_their_affines_say_and_batches_are_as_monais(
    crop: str, kind: str, lazy: bool, files: list[dict[str, str]], tmp_path: Path
) -> None:
    count, make = CROPS[crop]
    dataset = make_dataset(kind, files, make(), lazy, tmp_path)
    loader = PatchQueueLoader(dataset, batch_size=VOLUMES, shuffle=True, batch_unit="volume", seed=0)
    original = next(iter(DataLoader(dataset, batch_size=VOLUMES, shuffle=True)))
    corners = np.array([[0, 0, 0, 1], [7, 0, 3, 1], [7, 7, 7, 1]])
    seen: Counter[int] = Counter()
    for batch in [*loader, *loader]:
        assert structure(batch) == structure(original)
        for number, affine in enumerate(batch["image"].affine.numpy()):
            case = int(batch["image"][number].min()) // 10000
            seen[case] += 1
            places = (np.linalg.inv(AFFINE) @ affine @ corners.T)[:3].T
            assert np.abs(places - places.round()).max() < 1e-4
            for key in KEYS:
                volume = nib.load(files[case][key]).get_fdata()
                assert np.array_equal(batch[key].affine[number], affine)
                for corner, place in zip(corners, places.round().astype(int), strict=True):
                    assert batch[key].as_tensor()[number, 0][tuple(corner[:3])] == volume[tuple(place)]
    assert seen == dict.fromkeys(range(VOLUMES), 2 * count)


def test_files_of_a_persistent_dataset_that_keep_no_metadata_serve_too(
    files: list[dict[str, str]], tmp_path: Path
) -> None:
    transforms = [LoadImaged(KEYS), EnsureChannelFirstd(KEYS), CROPS["RandSpatialCropd"][1]()]
    dataset = PersistentDataset(files, transforms, tmp_path)
    for _ in range(2):  # the first time with metadata, then without
        loader = PatchQueueLoader(dataset, batch_size=VOLUMES, shuffle=True, seed=0)
        batches = [batch for _ in range(2) for batch in loader]
        original = next(iter(DataLoader(dataset, batch_size=VOLUMES, shuffle=True)))
    assert [structure(batch) for batch in batches] == 2 * [structure(original)]
    for batch in batches:
        cases = batch["image"].flatten(1).amin(1).long() // 10000
        assert sorted(cases.tolist()) == [*range(VOLUMES)]


class Collate:
    """A collation of the user's own."""

    def __call__(self, patches: list[Any]) -> dict[str, Any]:
        return {**list_data_collate(patches), "number": len(patches)}


ARGUMENTS: dict[str, dict[str, Any]] = {
    "collate_fn": {"collate_fn": Collate()},
    "MONAI's collate_fn": {"collate_fn": list_data_collate},
    "pin_memory": {"pin_memory": True},
    "pin_memory_device": {"pin_memory": True, "pin_memory_device": "cuda:0"},
    "persistent_workers": {"persistent_workers": True, "num_workers": 1},
    "workers anew": {"persistent_workers": False, "num_workers": 1},
    "timeout": {"timeout": 60, "num_workers": 1},
    "worker_init_fn": {"worker_init_fn": print, "num_workers": 1},
    "MONAI's worker_init_fn": {"worker_init_fn": monai_worker_init_fn, "num_workers": 1, "worker_type": "thread"},
    "context": {"multiprocessing_context": "fork", "num_workers": 1},
    "generator": {"generator": torch.Generator().manual_seed(3)},
    "sampler": {"sampler": [2, 1, 0], "shuffle": False},
    "shuffle": {"shuffle": None},
    "drop_last": {"drop_last": True},
    "nothing": {"prefetch_factor": None, "batch_sampler": None, "in_order": True, "pin_memory_device": ""},
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_arguments_of_a_dataloader_do_what_they_do_there(
    name: str, files: list[dict[str, str]], tmp_path: Path
) -> None:
    dataset = make_dataset("CacheDataset", files, CROPS["RandCropByPosNegLabeld"][1](), False, tmp_path)
    arguments = {"batch_size": 2, "shuffle": True, **ARGUMENTS[name]}
    with PatchQueueLoader(dataset, **arguments, batch_unit="volume", seed=0) as loader:
        batches = list(loader)
        assert len(list(loader)) == len(batches)
    sizes = [len(batch["image"]) for batch in batches]
    assert sizes == ([4] if name == "drop_last" else [4, 2])
    if name == "collate_fn":
        assert [batch["number"] for batch in batches] == sizes
    if name == "sampler":
        assert loader.sampler == [2, 1, 0]
    if name == "shuffle":
        assert [Path(f).name for f in batches[0]["image"].meta["filename_or_obj"]] == [
            f"image_{case}.nii.gz" for case in (0, 0, 1, 1)
        ]


def test_what_a_dataloader_takes_is_in_the_signature() -> None:
    taken = set(inspect.signature(torch.utils.data.DataLoader).parameters)
    assert taken <= set(inspect.signature(PatchQueueLoader).parameters)
