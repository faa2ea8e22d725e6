# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import Dataset, MetaTensor
from monai.transforms import Compose

from monai_patchqueue import LoadVolumed, PatchQueueLoader, RandUniformPatchd
from monai_patchqueue.queue.transfer import Transfer
from tests.nifti_files import voxels, write_nifti

KEYS = ["image", "label", "weight"]
DTYPES = {"image": ("i2",) * 4, "label": ("u1", "i2", "u1", "u1"), "weight": ("u2", "u2", "f4", "u2")}
"""Of four volumes. Only the images have one dtype that every device can cast."""

DEVICES = [
    "cpu",
    "meta",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("transfer")
    return [
        {k: write_nifti(folder / f"{n}_{k}.nii", voxels((20, 22, 24), DTYPES[k][n], n)) for k in KEYS} for n in range(4)
    ]


def batches(files: list[dict[str, str]], **options: Any) -> list[dict[str, Any]]:
    transform = Compose(
        [LoadVolumed(KEYS, ensure_channel_first=True, lazy_read=True), RandUniformPatchd(KEYS, 16, num_samples=4)]
    )
    options = {"batch_size": 4, "batch_unit": "patch", "queue_length": 16, "shuffle": True, "seed": 0, **options}
    with PatchQueueLoader(Dataset(files, transform), **options) as loader:
        return list(loader)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, torch.dtype]]:
    """Dtypes of arrays when they are moved, and those that they are to have afterwards."""
    found: list[tuple[torch.dtype, torch.dtype]] = []
    move = Transfer.move

    def note(self: Transfer, array: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        found.append((array.dtype, dtype))
        return move(self, array, dtype)

    monkeypatch.setattr(Transfer, "move", note)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_on_a_device_are_those_of_main_memory(files: list[dict[str, str]], device: str, workers: int) -> None:
    for expected, found in zip(batches(files), batches(files, device=device, num_workers=workers), strict=True):
        assert found.keys() == expected.keys()
        for key in KEYS:
            assert type(found[key]) is MetaTensor
            assert found[key].device.type == device
            assert (found[key].dtype, found[key].shape) == (expected[key].dtype, expected[key].shape)
            assert found[key].meta["filename_or_obj"] == expected[key].meta["filename_or_obj"]
            assert device != "cuda" or found[key].is_contiguous()
            assert device == "meta" or torch.equal(found[key].as_tensor().cpu(), expected[key].as_tensor())


def test_arrays_are_cast_on_the_device_where_all_patches_of_a_batch_have_one_dtype(
    files: list[dict[str, str]], moved: list[tuple[torch.dtype, torch.dtype]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batches(files)
    monkeypatch.setattr(Transfer, "casts", True)
    for one, other in zip(batches(files, device="cpu"), expected, strict=True):
        for key in KEYS:
            assert torch.equal(one[key].as_tensor(), other[key].as_tensor())
    assert {target for _, target in moved} == {torch.float32}
    before = [{moved[3 * number + place][0] for number in range(4)} for place in range(3)]
    assert before[0] == {torch.int16}
    assert torch.float32 in before[1]
    assert before[2] == {torch.float32}


def test_arrays_are_cast_in_main_memory_where_somebody_sees_them_there(
    files: list[dict[str, str]], moved: list[tuple[torch.dtype, torch.dtype]]
) -> None:
    seen = []

    def look(item: dict[str, Any]) -> dict[str, Any]:
        seen.append((item["image"].dtype, item["image"].device.type))
        return item

    found = batches(files, device="meta", item_transform=look)
    assert {batch["image"].device.type for batch in found} == {"meta"}
    assert set(seen) == {(torch.float32, "cpu")}
    assert not moved
