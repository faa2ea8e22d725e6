# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import Dataset
from monai.transforms import Compose, Lambdad, Orientationd

from monai_patchqueue import GridPatchLoader, GridPatchSamplesd, LoadVolumed, PatchAggregator
from tests.nifti_files import AFFINE, write_nifti

STATUS = Path("/proc/self/status")
SHAPE = (128, 64, 256)


def anonymous_memory() -> int:
    """Bytes that this process holds, without those of files that are mapped into memory."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not STATUS.exists(), reason="there is no /proc to tell how much memory a process holds")
def test_neither_volume_nor_outputs_are_held_in_memory(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(-500, 500, SHAPE, np.int16)
    file = write_nifti(tmp_path / "large.nii", volume)
    threshold = 0.5
    classes = 16  # of float32, so that their sums would be 32 times the file

    def network(image: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [torch.full_like(image, threshold), image, (image - 1).expand(-1, classes - 2, -1, -1, -1)], dim=1
        )

    expected = volume > threshold * volume.std() + volume.mean()
    del volume
    prepare = Compose(
        [
            LoadVolumed("image", ensure_channel_first=True, lazy_read=True),
            Lambdad("image", lambda image: image.normalized()),
            Orientationd("image", "RAS", labels=None),
        ]
    )
    grid = GridPatchSamplesd("image", (8, 64, 64), overlap=(2, 16, 16))
    loader = GridPatchLoader(
        Dataset([{"image": file}], prepare),
        grid,
        batch_size=8,
        patches_at_once=8,
        samples_per_volume=grid.count((SHAPE[1], SHAPE[0], SHAPE[2])),
    )
    aggregator = PatchAggregator("gaussian", argmax=True, output_dir=tmp_path / "out", output_format="nii")
    before, most, done = anonymous_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with loader:
        whole = [volume for batch in loader for volume in aggregator.add(network(batch["image"].as_tensor()), batch)]
    done.set()
    watcher.join()
    outputs = classes * np.prod(SHAPE) * 4
    assert most - before < outputs / 2
    image = nib.as_closest_canonical(nib.Nifti1Image(expected.astype(np.uint8), AFFINE))
    written = nib.load(whole[0].meta["saved_to"])
    assert np.array_equal(written.get_fdata(), image.get_fdata())
    np.testing.assert_allclose(written.affine, image.affine)
