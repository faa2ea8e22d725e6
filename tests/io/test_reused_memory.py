# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_patchqueue import LoadVolumed, RandUniformPatchd
from monai_patchqueue.io import nifti
from monai_patchqueue.io.reused_memory import ReusedMemory

BYTE = np.dtype(np.uint8)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ReusedMemory:
    reused = ReusedMemory()
    reused.keep(2)
    monkeypatch.setattr(nifti, "decompressed", reused)
    return reused


def test_memory_that_anybody_refers_to_is_not_given_out_again(memory: ReusedMemory) -> None:
    arrays = [memory.take(1000, BYTE) for _ in range(5)]
    assert len({array.ctypes.data for array in arrays}) == 5
    tensor = torch.from_numpy(arrays.pop(0).reshape(10, 100)[3:5])
    address = arrays[0].ctypes.data
    del arrays
    assert memory.take(1000, BYTE).ctypes.data == address
    assert tensor.untyped_storage().data_ptr() != address


def test_no_more_is_kept_than_was_said(memory: ReusedMemory) -> None:
    for nbytes in (1000, 5000, 200, 9000):
        memory.take(nbytes, BYTE)
        assert len(memory._buffers) <= 2
    assert {buffer.nbytes for buffer in memory._buffers} == {200, 9000}


def test_nothing_is_kept_where_nobody_has_said_so() -> None:
    memory = ReusedMemory()
    memory.take(1000, BYTE)
    assert memory._buffers == []


def test_a_volume_that_is_still_in_use_stays_as_it_is(memory: ReusedMemory, tmp_path: Path) -> None:
    for i in range(4):
        nib.save(nib.Nifti1Image(np.full((20, 20, 20), i, np.int16), np.eye(4)), tmp_path / f"{i}.nii.gz")
    load = LoadVolumed("image", ensure_channel_first=True, lazy_read=True)
    crop = RandUniformPatchd("image", 8, num_samples=2)
    volumes = [load({"image": str(tmp_path / f"{i}.nii.gz")}) for i in range(3)]
    crop.copies = False
    patches = [patch["image"] for patch in crop(volumes.pop(0))]
    for i in (3, 3, 3):
        assert (load({"image": str(tmp_path / f"{i}.nii.gz")})["image"] == i).all()
    assert all((patch == 0).all() for patch in patches)
    assert [int(volume["image"].max()) for volume in volumes] == [1, 2]
