# SPDX-License-Identifier: Apache-2.0
"""Batches have what MONAI's own collation of the same patches has."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import Dataset, MetaTensor, decollate_batch, list_data_collate
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandRotate90d,
    RandSpatialCropSamplesd,
    Spacingd,
)

from monai_patchqueue import RandUniformPatchd
from tests.pipelines import make_loader
from tests.volumes import blobs, meta, numbered

pytestmark = pytest.mark.timeout(60)

WORKERS = [
    pytest.param({"num_workers": 0}, id="inline"),
    pytest.param({"num_workers": 2, "worker_type": "thread"}, id="threads"),
    pytest.param({"num_workers": 2}, id="processes"),
]


# Traces hold the ids of their transforms, which must not become those of other objects.
ALIVE: list[Compose] = []


class Kept(Dataset):
    """Gives patches that it has made before."""

    def __init__(self, volumes: list[list[dict[str, Any]]]) -> None:
        super().__init__(volumes)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return self.data[index]


def assert_same(found: Any, expected: Any, where: str = "batch") -> None:
    """Equal in class, dtype, metadata and value, all the way down."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert found.shape == expected.shape, where
        if isinstance(expected, MetaTensor):
            assert found.is_batch == expected.is_batch, where
            assert_same(found.meta, expected.meta, f"{where}.meta")
            assert_same(found.applied_operations, expected.applied_operations, f"{where}.applied_operations")
            assert vars(found).keys() == vars(expected).keys(), where
            found, expected = found.as_tensor(), expected.as_tensor()
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert np.array_equal(found, expected), where


def assert_as_monai(volumes: list[list[dict[str, Any]]], **workers: Any) -> None:
    expected = list_data_collate([patch for volume in volumes for patch in volume])
    with make_loader(Kept(volumes), samples_per_volume=len(volumes[0]), batch_size=1000, **workers) as loader:
        (batch,) = list(loader)
        assert_same(batch, expected)


def meta_patches() -> list[list[dict[str, Any]]]:
    crop = Compose(
        [
            RandFlipd("image", prob=1.0, spatial_axis=0),
            RandSpatialCropSamplesd(["image", "label"], (16, 16, 12), 3, random_size=False),
            RandRotate90d("image", prob=0.7),
        ]
    )
    crop.set_random_state(0)
    ALIVE.append(crop)
    return [
        crop(
            {
                "image": meta(numbered(20, 20, 20).astype(np.float32), file=f"case_{i}.nii.gz"),
                "label": meta(blobs(20, 20, 20)),
                "subject": f"case_{i}",
                "age": 40 + i,
                "weight": 70.5,
                "male": True,
                "site": {"name": "A", "scanner": {"tesla": 3.0, "coils": [1, 2]}},
            }
        )
        for i in range(3)
    ]


@pytest.mark.parametrize("workers", WORKERS)
def test_meta_tensors_have_metadata_affine_and_traces_as_from_monai(workers: dict[str, Any]) -> None:
    assert_as_monai(meta_patches(), **workers)


@pytest.mark.parametrize("workers", WORKERS)
def test_small_meta_tensors_beside_the_slab_have_them_too(workers: dict[str, Any]) -> None:
    assert_as_monai([[{"image": patch["image"][:, :5, :5, :5]} for patch in v] for v in meta_patches()], **workers)


VALUES: dict[str, Any] = {
    "string": lambda i: f"name {i}",
    "int": lambda i: i,
    "float": lambda i: i / 3,
    "bool": lambda i: i % 2 == 0,
    "list": lambda i: [i, 2.5, "a"],
    "tuple": lambda i: (i, "a"),
    "nested": lambda i: {"a": {"b": [i, {"c": f"{i}"}]}, "d": torch.tensor([i])},
    "numpy scalar": lambda i: np.float32(i),
    "0-d array": lambda i: np.array(i / 2),
    "0-d tensor": lambda i: torch.tensor(i),
    "small array": lambda i: np.arange(i, i + 4, dtype=np.int16),
    "small tensor": lambda i: torch.arange(i, i + 4),
    "small bfloat16": lambda i: torch.arange(i, i + 4).bfloat16(),
    "small view": lambda i: torch.arange(10_000)[i : i + 3],
    "negative zero": lambda i: torch.tensor([0.0, -0.0]),
    "nan": lambda i: float("nan"),
    "empty": lambda i: torch.empty(0),
    "bytes": lambda i: b"abc",
    "ordered dict": lambda i: OrderedDict(b=i, a=1),
    "grad": lambda i: torch.ones(3) * i,
}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", VALUES)
def test_values_beside_the_slab_are_collated_as_by_monai(name: str, workers: dict[str, Any]) -> None:
    volumes = [
        [{"image": torch.full((1, 40, 40), float(v)), "value": VALUES[name](3 * v + p)} for p in range(3)]
        for v in range(2)
    ]
    if name == "nan":
        with make_loader(Kept(volumes), samples_per_volume=3, batch_size=6, **workers) as loader:
            assert bool(next(iter(loader))["value"].isnan().all())
    else:
        assert_as_monai(volumes, **workers)


@pytest.mark.parametrize("workers", WORKERS)
def test_items_without_any_large_array_are_collated_as_by_monai(workers: dict[str, Any]) -> None:
    assert_as_monai([[{"a": v * 2 + p, "b": torch.ones(2)} for p in range(2)] for v in range(3)], **workers)


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_goes_through_the_slab_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    volumes = []
    for _ in range(2):
        bits = torch.randint(0, 2 if dtype == torch.bool else 120, (2, 1, 80, 128), generator=generator)
        volumes.append([{"image": patch.to(dtype)} for patch in bits])
    assert_as_monai(volumes)
    assert_as_monai(volumes, num_workers=1)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint16, np.int16, np.float32, np.float64], ids=lambda d: d.__name__)
def test_numpy_arrays_go_through_the_slab_as_tensors(dtype: type) -> None:
    rng = np.random.default_rng(0)
    volumes = [[{"image": rng.integers(0, 2, (1, 80, 80)).astype(dtype)} for _ in range(2)] for _ in range(2)]
    assert_as_monai(volumes)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda a: a[:, ::-1], id="negative strides"),
        pytest.param(lambda a: np.asfortranarray(a), id="file order"),
        pytest.param(lambda a: np.broadcast_to(a[:, :1], a.shape), id="read-only"),
    ],
)
@pytest.mark.parametrize("size", [8, 80])
def test_odd_numpy_memory_is_taken(view: Any, size: int) -> None:
    array = np.arange(size * size, dtype=np.float32).reshape(1, size, size)
    (batch,) = list(make_loader(Dataset([{"image": view(array)}]), num_workers=0))
    assert torch.equal(torch.as_tensor(batch["image"])[0], torch.from_numpy(view(array).astype(np.float32).copy()))


def test_the_other_byte_order_is_taken_where_monai_refuses_it() -> None:
    array = np.arange(80 * 80, dtype=">f4").reshape(1, 80, 80)
    (batch,) = list(make_loader(Dataset([{"image": array}])))
    assert torch.equal(batch["image"][0], torch.arange(80.0 * 80).reshape(1, 80, 80))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("size", [5, 80])
def test_tensors_that_require_gradients_are_taken(size: int, workers: dict[str, Any]) -> None:
    leaf = torch.ones(1, size, size, requires_grad=True)
    with make_loader(Dataset([{"image": leaf}, {"image": leaf * 2}]), batch_size=2, **workers) as loader:
        (batch,) = list(loader)
    assert batch["image"].sum().item() == 3 * size * size


@pytest.mark.parametrize("workers", WORKERS)
def test_a_custom_collation_gets_patches_with_metadata(workers: dict[str, Any]) -> None:
    volumes = meta_patches()
    expected = [patch for volume in volumes for patch in volume]
    with make_loader(Kept(volumes), samples_per_volume=3, batch_size=9, collate_fn=list, **workers) as loader:
        assert_same(next(iter(loader)), expected)


# -- inversion


def inverted(batch: dict[str, Any], pipeline: Compose) -> list[dict[str, Any]]:
    invert = Invertd("image", pipeline, orig_keys="image", nearest_interp=True)
    return [invert(patch) for patch in decollate_batch(batch)]


AND_PICKLED = [*WORKERS, pytest.param({"num_workers": 1, "multiprocessing_context": "forkserver"}, id="pickled")]


@pytest.mark.parametrize("workers", AND_PICKLED)
def test_patches_go_back_to_their_place_in_the_volume(workers: dict[str, Any]) -> None:
    crop = RandUniformPatchd("image", (12, 12, 14), num_samples=2)
    pipeline = Compose([RandFlipd("image", prob=0.5, spatial_axis=1), crop, RandRotate90d("image", prob=0.5)])
    volume = numbered(20, 20, 20).astype(np.float32)
    dataset = Dataset([{"image": meta(volume, file=f"case_{i}.nii.gz")} for i in range(3)], pipeline)
    with make_loader(dataset, batch_size=3, shuffle=True, **workers) as loader:
        for batch in loader:
            for patch in inverted(batch, pipeline):
                image = patch["image"].as_tensor()
                assert image.shape == (1, 20, 20, 20)
                inside = image != 0
                assert inside.sum() == 12 * 12 * 14
                assert torch.equal(image[inside], torch.from_numpy(volume)[inside])


@pytest.mark.parametrize("workers", WORKERS)
def test_a_stock_pipeline_keeps_file_names_and_affines(workers: dict[str, Any], tmp_path: Path) -> None:
    records = []
    for case in range(3):
        record = {key: str(tmp_path / f"{key}_{case}.nii.gz") for key in ("image", "label")}
        nib.save(nib.Nifti1Image(numbered(24, 24, 24)[0].astype(np.int16), np.diag([2, 2, 3, 1.0])), record["image"])
        nib.save(nib.Nifti1Image(blobs(24, 24, 24)[0], np.diag([2, 2, 3, 1.0])), record["label"])
        records.append(record)
    keys = ["image", "label"]
    pipeline = Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            Spacingd(keys, (2, 2, 2), mode=("bilinear", "nearest")),
            RandCropByPosNegLabeld(keys, "label", (16, 16, 16), pos=1, neg=1, num_samples=2),
        ]
    )
    with make_loader(Dataset(records, pipeline), batch_size=4, **workers) as loader:
        first = next(iter(loader))
    assert first["image"].is_batch
    for number, patch in enumerate(decollate_batch(first)):
        case = number // 2
        for key in keys:
            assert patch[key].meta["filename_or_obj"] == records[case][key]
            assert patch[key].shape == (1, 16, 16, 16)
            assert torch.allclose(patch[key].affine.diagonal(), torch.tensor([2.0, 2, 2, 1]).double())
            begin = torch.tensor(patch[key].meta["crop_center"]) - 8
            assert torch.allclose(patch[key].affine[:3, 3], 2.0 * begin.double())
            assert [trace["class"] for trace in patch[key].applied_operations][-1].startswith("RandCropByPosNegLabel")
        assert patch["image"].pixdim.tolist() == [2, 2, 2]
