# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset, decollate_batch
from monai.engines import SupervisedTrainer
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandCropByPosNegLabeld, ScaleIntensityd
from torch.utils.data import DistributedSampler

from monai_patchqueue import PatchQueueLoader
from tests.volumes import blobs


@pytest.mark.parametrize(
    "workers",
    [{}, {"num_workers": 2}, {"num_workers": 2, "worker_type": "thread"}],
    ids=["inline", "process", "thread"],
)
@pytest.mark.parametrize("distributed", [False, True])
def test_a_stock_pipeline_trains_under_a_supervised_trainer(
    distributed: bool, workers: dict[str, Any], tmp_path: Path
) -> None:
    records = []
    for case in range(4):
        label = blobs(24, 24, 24, seed=case)[0]
        record = {key: str(tmp_path / f"{key}_{case}.nii.gz") for key in ("image", "label")}
        nib.save(nib.Nifti1Image((label * 100 + case).astype(np.int16), np.eye(4)), record["image"])
        nib.save(nib.Nifti1Image(label, np.eye(4)), record["label"])
        records.append(record)
    keys = ["image", "label"]
    pipeline = Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            ScaleIntensityd("image"),
            RandCropByPosNegLabeld(keys, "label", (16, 16, 16), num_samples=3),
        ]
    )
    dataset = Dataset(records, pipeline)
    order: dict[str, Any] = {"shuffle": True}
    if distributed:
        order = {"sampler": DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True)}
    loader = PatchQueueLoader(dataset, batch_size=4, batch_unit="patch", seed=0, **order, **workers)
    network = torch.nn.Conv3d(1, 4, 3, padding=1)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=2,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.01),
        loss_function=lambda output, label: torch.nn.functional.cross_entropy(output, label[:, 0].long()),
        decollate=True,
    )
    seen: dict[int, list[str]] = {1: [], 2: []}

    @trainer.on(Events.ITERATION_COMPLETED)
    def look() -> None:
        for patch in trainer.state.output:
            assert patch["image"].shape == patch["label"].shape == (1, 16, 16, 16)
            name = patch["image"].meta["filename_or_obj"]
            assert patch["label"].meta["filename_or_obj"] == name.replace("image", "label")
            corner = torch.tensor(patch["image"].meta["crop_center"]) - 8
            assert patch["image"].affine[:3, 3].tolist() == corner.tolist()
            seen[trainer.state.epoch].append(name)

    trainer.run()
    assert trainer.state.iteration == 6
    names = sorted(3 * [record["image"] for record in records])
    assert sorted(seen[1]) == sorted(seen[2]) == names
    assert seen[1] != seen[2]
    loader.close()
    assert len(decollate_batch(next(iter(loader)))) == 4
    loader.close()
