# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import Dataset
from monai.transforms import Compose, Orientationd
from nibabel.orientations import io_orientation

from monai_patchqueue import LoadVolumed, PatchQueueLoader, RandUniformPatchd
from monai_patchqueue.queue.record import slab_specs
from monai_patchqueue.queue.schedule import Ticket
from monai_patchqueue.queue.slab import KeySpec, Slab, SlabHandle, SlabLayout
from monai_patchqueue.queue.worker import Preparer, Recipe, write
from tests.nifti_files import AFFINE, voxels, write_nifti

FILES: list[dict[str, Any]] = [
    {"dtype": "i2"},
    {"dtype": "f4"},
    {"dtype": "u1"},
    {"dtype": "i2", "slope": 0.5, "inter": -3},
    {"dtype": "i2", "endian": ">"},
    {"dtype": "f8"},
]
"""Of six volumes, which lie in their slots as i2, f4, u1, f4, i2, f4."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("narrow")
    items = []
    for number, options in enumerate(FILES):
        slope, inter, endian = options.get("slope", math.nan), options.get("inter", 0), options.get("endian", "<")
        image = voxels((20, 22, 24), endian + options["dtype"], number)
        label = voxels((20, 22, 24), "u1", number)
        named = {"image": (image, {"slope": slope, "inter": inter, "endian": endian}), "label": (label, {})}
        items.append({k: write_nifti(folder / f"{number}_{k}.nii", a, **more) for k, (a, more) in named.items()})
    return items


def dataset(files: list[dict[str, str]], lazy_read: bool, **options: Any) -> Dataset:
    keys = ["image", "label"]
    load = LoadVolumed(keys, ensure_channel_first=True, lazy_read=lazy_read)
    turn = Orientationd(keys, axcodes="RAS", labels=None)
    return Dataset(files, Compose([load, turn, RandUniformPatchd(keys, 16, num_samples=4, **options)]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("padding", [None, "constant"])
def test_batches_are_the_same_whatever_the_files_dtypes(
    files: list[dict[str, str]], workers: int, padding: str | None
) -> None:
    options = {"border": "pad", "padding_mode": padding} if padding else {}
    batches = []
    for lazy_read, num_workers in ((False, 0), (True, workers)):
        data = dataset(files, lazy_read, **options)
        with PatchQueueLoader(data, num_workers, batch_size=4, batch_unit="patch", seed=0, queue_length=12) as loader:
            batches.append([batch for _ in range(2) for batch in loader])
    assert len(batches[0]) == 12
    for expected, found in zip(*batches, strict=True):
        for key in ("image", "label"):
            assert found[key].dtype == torch.float32
            assert torch.equal(found[key].as_tensor(), expected[key].as_tensor())
            assert torch.equal(found[key].affine, expected[key].affine)


def test_a_slot_has_the_files_dtype_where_a_cast_gives_the_values_and_the_rest_is_not_touched(
    files: list[dict[str, str]],
) -> None:
    prepare = Preparer(Recipe(dataset(files, lazy_read=True), 0), "inline", written=True)
    slab = None
    found = []
    for number in range(len(files)):
        volume = prepare(Ticket(0, number, 0, 4))
        slab = slab or Slab(SlabHandle(shared=False), SlabLayout(24, slab_specs(volume.patches[0])))
        record = write(volume, slab, range(4 * number, 4 * number + 4), "")
        narrow = record.narrow.get("image", [None])
        assert len(set(narrow)) == 1
        found.append(narrow[0])
        width = 4 if narrow[0] is None else narrow[0].itemsize
        rows = slab.rows["image"][4 * number : 4 * number + 4]
        assert rows[:, : width * 16**3].any(axis=1).all()
        assert not rows[:, width * 16**3 :].any()
    assert found == [np.int16, None, np.uint8, None, np.int16, None]
    assert io_orientation(AFFINE)[0, 0] == 1  # the slots' axes are in another order than the files'


def test_narrow_slots_begin_where_the_slots_do() -> None:
    spec = KeySpec((1, 3, 4), torch.float32, order=(0, 2, 1))
    slab = Slab(SlabHandle(shared=False), SlabLayout(2, {"image": spec}))
    values = np.arange(12, dtype=np.int16).reshape(1, 3, 4)
    slab.narrow("image", values.dtype)[1] = values
    assert slab.rows["image"][1].view(np.int16)[:12].tolist() == values.transpose(0, 2, 1).ravel().tolist()
    assert not slab.rows["image"][0].any()
