# SPDX-License-Identifier: Apache-2.0
"""A step of training from every kind of file, by nibabel's and ITK's readers, with patches where their affines say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import Dataset, ITKReader, MetaTensor, NibabelReader
from monai.engines import SupervisedTrainer
from monai.losses import DiceCELoss
from monai.transforms import Compose, LoadImaged, Orientationd, RandCropByPosNegLabeld

from monai_patchqueue import PatchQueueLoader, RandLabelPatchd
from tests.image_files import oblique_affine, write_image
from tests.volumes import blobs, numbered

SHAPE, SIZE = (24, 20, 16), (8, 8, 8)
KEYS = ["image", "label"]
CASES = [
    (".nii", NibabelReader),
    (".nii.gz", NibabelReader),
    (".nii", ITKReader),
    (".nii.gz", ITKReader),
    (".nrrd", ITKReader),
    (".mha", ITKReader),
    ("", ITKReader),
]
NAMES = [f"{suffix or 'DICOM'} by {reader.__name__}" for suffix, reader in CASES]
CROPS: dict[str, Any] = {
    "MONAI's crop": lambda: RandCropByPosNegLabeld(KEYS, "label", SIZE, num_samples=4),
    "ours": lambda: RandLabelPatchd(KEYS, "label", SIZE, num_samples=4),
}


def assert_patch_is_of(patch: MetaTensor, affine: torch.Tensor, volume: np.ndarray) -> None:
    """Each voxel is the volume's at the same place of the world."""
    indices = np.stack([*np.indices(patch.shape[1:]).reshape(3, -1), np.ones(patch[0].numel())])
    places = (np.linalg.inv(oblique_affine()) @ affine.numpy() @ indices)[:3]
    assert np.abs(places - places.round()).max() < 1e-3
    assert np.array_equal(patch.numpy()[0].ravel(), volume[tuple(places.round().astype(int))])


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize(("suffix", "reader"), CASES, ids=NAMES)
def test_a_step_is_trained_on_patches_that_are_where_their_affines_say(
    suffix: str, reader: Any, crop: str, tmp_path: Path
) -> None:
    label = blobs(*SHAPE, classes=2)[0]
    volumes = {"image": numbered(*SHAPE)[0].astype(np.int16), "label": label}
    record = {key: str(write_image(tmp_path / f"{key}{suffix}", volume)) for key, volume in volumes.items()}
    # The orientation changes axes and directions, so that an affine has to be followed.
    load = [LoadImaged(KEYS, reader=reader, ensure_channel_first=True), Orientationd(KEYS, "LIP", labels=None)]
    network = torch.nn.Conv3d(1, 3, 3, padding=1)
    before = network.weight.detach().clone()
    with PatchQueueLoader(
        Dataset([record], Compose([*load, CROPS[crop]()])), 1, batch_size=4, batch_unit="patch", seed=0
    ) as loader:
        trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=1,
            train_data_loader=loader,
            network=network,
            optimizer=torch.optim.SGD(network.parameters(), 0.01),
            loss_function=DiceCELoss(to_onehot_y=True, softmax=True),
            decollate=False,
        )
        trainer.run()
    assert trainer.state.iteration == 1
    assert np.isfinite(trainer.state.output["loss"])
    assert not torch.equal(network.weight, before)
    batch = trainer.state.batch
    assert batch["image"].shape == (4, 1, *SIZE)
    for key, volume in volumes.items():
        for patch, affine in zip(batch[key].as_tensor(), batch[key].affine, strict=True):
            assert_patch_is_of(patch, affine, volume)


def test_the_check_of_places_can_fail() -> None:
    volume = numbered(*SHAPE)[0]
    affine = torch.from_numpy(oblique_affine())
    patch = torch.from_numpy(volume[None, :8, :8, :8])
    assert_patch_is_of(patch, affine, volume)
    shifted = affine.clone()
    shifted[:3, 3] += affine[:3, 0]
    with pytest.raises(AssertionError):
        assert_patch_is_of(patch, shifted, volume)
    with pytest.raises(AssertionError):
        assert_patch_is_of(patch, affine @ torch.diag(torch.tensor([1.0, 1.0, 1.01, 1.0])).double(), volume)
