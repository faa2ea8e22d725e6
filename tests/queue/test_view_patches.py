# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, Dataset, MetaTensor
from monai.transforms import Compose, Flipd, RandSpatialCropSamplesd, ScaleIntensityRanged
from torch.utils.data import Subset

from monai_patchqueue import LoadVolumed, PatchQueueLoader, RandUniformPatchd
from monai_patchqueue.queue.view_patches import last_transform

SHAPE = (1, 24, 24, 24)
CROPS: dict[str, Callable[[], Any]] = {
    "ours": lambda: RandUniformPatchd("image", 16, num_samples=4),
    "monai's": lambda: RandSpatialCropSamplesd("image", 16, 4, random_size=False),
}


def volumes(number: int = 3) -> list[dict[str, Any]]:
    return [{"image": MetaTensor(torch.arange(13824.0).reshape(SHAPE) + 20000 * i)} for i in range(number)]


class Brightening(Dataset):
    """Writes into what its transforms give."""

    def __getitem__(self, index: Any) -> Any:
        patches: Any = super().__getitem__(index)
        for patch in patches:
            patch["image"] += 1
        return patches


def drawn(dataset: Any, **arguments: Any) -> list[torch.Tensor]:
    arguments = {"num_workers": 0, "batch_size": 4, "batch_unit": "patch", "seed": 0, **arguments}
    with PatchQueueLoader(dataset, **arguments) as loader:
        return [patch.as_tensor() for _ in range(2) for batch in loader for patch in batch["image"]]


def is_whole(patch: torch.Tensor, brighter: float = 0.0) -> bool:
    """Whether a patch has the voxels of one place of a volume."""
    first = patch[0, 0, 0, 0]
    steps = torch.arange(13824.0).reshape(SHAPE)[0, :16, :16, :16]
    return bool(((first - brighter) % 1 == 0).item()) and torch.equal(patch[0], first + steps)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("kind", [Dataset, CacheDataset])
@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}, {"num_workers": 1, "worker_type": "thread"}])
def test_patches_are_right_and_volumes_stay_as_they_were(crop: str, kind: Any, workers: dict[str, Any]) -> None:
    data, options = volumes(), {"progress": False} if kind is CacheDataset else {}
    dataset = kind(data, Compose([CROPS[crop]()]), **options)
    patches = drawn(dataset, **workers)
    assert len(patches) == 24
    assert all(map(is_whole, patches))
    for found, expected in zip(data, volumes(), strict=True):
        assert torch.equal(found["image"], expected["image"])


def test_a_dataset_that_writes_into_its_patches_gets_patches_of_their_own() -> None:
    data = volumes()
    patches = drawn(Brightening(data, CROPS["ours"]()))
    assert all(is_whole(patch, brighter=1.0) for patch in patches)
    assert torch.equal(data[0]["image"], volumes()[0]["image"])


def _brighten(patch: Any) -> Any:
    patch["image"] += 1
    return patch


def test_a_patch_transform_that_writes_into_patches_gets_patches_of_their_own() -> None:
    data = volumes()
    patches = drawn(CacheDataset(data, CROPS["ours"](), progress=False), patch_transform=_brighten)
    assert all(is_whole(patch, brighter=1.0) for patch in patches)
    assert torch.equal(data[0]["image"], volumes()[0]["image"])


def test_a_transform_copies_again_once_the_loader_is_done_with_a_volume() -> None:
    crop = RandUniformPatchd("image", 16, num_samples=4)
    drawn(Dataset(volumes(), crop))
    item = volumes(1)[0]
    patches = crop(item)
    before = patches[0]["image"].clone()
    item["image"] += 1
    assert torch.equal(patches[0]["image"], before)


def test_what_an_executor_sends_back_has_memory_of_its_own() -> None:
    seen: list[int] = []

    class Watching(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            future = super().submit(*args, **kwargs)
            future.add_done_callback(
                lambda done: seen.extend(p["image"].untyped_storage().nbytes() for p in done.result().patches)
            )
            return future

    with Watching(1) as executor:
        assert all(map(is_whole, drawn(Dataset(volumes(), CROPS["ours"]()), executor=executor)))
    assert set(seen) == {16**3 * 4}


@pytest.mark.parametrize("order", ["F", "C"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.complex128, torch.bool])
def test_patches_lie_in_a_batch_in_their_order_of_axes_in_memory(order: str, dtype: torch.dtype) -> None:
    one = torch.from_numpy(np.asarray(np.random.default_rng(0).integers(0, 2, (24, 23, 22)), order=order)).to(dtype)
    other = torch.from_numpy(np.random.default_rng(1).integers(0, 2, (24, 23, 22))).to(dtype)
    dataset = Dataset([{"image": one[None]}, {"image": other[None]}], RandUniformPatchd("image", (18, 17, 16)))
    with PatchQueueLoader(dataset, batch_size=2, batch_unit="patch", seed=0) as loader:
        batch = next(iter(loader))
    for patch, ((x, _), (y, _), (z, _)), volume in zip(
        batch["image"], batch_locations(batch), (one, other), strict=True
    ):
        assert torch.equal(patch[0], volume[x : x + 18, y : y + 17, z : z + 16])
    assert batch["image"].is_contiguous() == (order == "C")
    assert batch["image"].permute(0, 1, 4, 3, 2).is_contiguous() == (order == "F")


def batch_locations(batch: Any) -> list[list[tuple[int, int]]]:
    """Start and stop per axis for each patch of a collated batch."""
    return [
        [(int(start[i]), int(stop[i])) for start, stop in batch["patch_location"]] for i in range(len(batch["image"]))
    ]


def test_last_transforms_are_known_of_monais_datasets_and_ours() -> None:
    crop = CROPS["ours"]()
    assert last_transform(Subset(Dataset([1], Compose([Compose([abs, crop])])), [0])) is crop
    assert last_transform(Brightening([1], crop)) is None
    assert last_transform([1]) is None
    assert last_transform(Dataset([1])) is None


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}, {"num_workers": 1, "worker_type": "thread"}])
@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_patches_of_lazily_read_volumes_are_those_of_whole_ones(
    workers: dict[str, Any], slope: float, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    items = []
    for i in range(3):
        image = nib.Nifti1Image(rng.integers(0, 99, (20, 21, 22)).astype(np.int16), np.diag([2, 3, 4, 1]))
        image.header.set_slope_inter(slope, 0 if slope == 1 else 3)
        nib.save(image, tmp_path / f"{i}.nii")
        items.append({"image": str(tmp_path / f"{i}.nii")})
    batches = {}
    for lazy_read in (False, True):
        load = LoadVolumed("image", ensure_channel_first=True, lazy_read=lazy_read)
        scaling = [Flipd("image", 1), ScaleIntensityRanged("image", 0, 9, 0, 1)]
        for name, between in {"as they are": [], "scaled": scaling}.items():
            crop = RandUniformPatchd("image", (17, 16, 18), num_samples=3)
            batches[lazy_read, name] = drawn(Dataset(items, Compose([load, *between, crop])), **workers)
    for name in ("as they are", "scaled"):
        for whole, lazily in zip(batches[False, name], batches[True, name], strict=True):
            assert torch.equal(whole, lazily)
