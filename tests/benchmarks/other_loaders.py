# SPDX-License-Identifier: Apache-2.0
"""Contestants: TorchIO's queue and nnU-Net's loader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from .pipelines import KEYS
from .registry import Batches, contestant
from .setup import CLASS_PROBABILITIES, Setup
from .stores import NnunetBatches, prepare_nnunet

NNUNET: dict[str, Any] = {
    "requires": "nnunetv2",
    "remedy": "--no-deps nnunetv2 (see README.md)",
    "imports": ("nnunetv2.training.dataloading.data_loader", "nnunetv2.utilities.label_handling.label_handling"),
    "layout": None,
}


@contestant("torchio", "TorchIO Queue", requires="torchio", remedy="'monai_patchqueue[bench]'", layout="torchio")
def torchio_queue(setup: Setup) -> Batches:
    import torchio as tio

    subjects = [
        tio.Subject(image=tio.ScalarImage(item["image"]), label=tio.LabelMap(item["label"])) for item in setup.items
    ]
    sampler = tio.LabelSampler(setup.patch_size, "label", CLASS_PROBABILITIES)
    queue = tio.Queue(
        tio.SubjectsDataset(subjects),
        setup.queue_length,
        setup.samples_per_volume,
        sampler,
        num_workers=setup.num_workers,
    )
    return _TorchIOBatches(tio.SubjectsLoader(queue, batch_size=setup.batch_size, num_workers=0))


@contestant("nnunet", "nnU-Net v2, its blosc2 files", prepare=partial(prepare_nnunet, normalize=False), **NNUNET)
def nnunet(setup: Setup) -> Batches:
    return NnunetBatches(setup, normalize=False)


@contestant(
    "nnunet-normalized",
    "nnU-Net v2, its blosc2 files, normalized images",
    prepare=partial(prepare_nnunet, normalize=True),
    **NNUNET,
)
def nnunet_normalized(setup: Setup) -> Batches:
    return NnunetBatches(setup, normalize=True)


@dataclass
class _TorchIOBatches:
    """TorchIO keeps the files' integers, MONAI makes float32: the drawn patches are cast, which is least work."""

    loader: Batches

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self.loader:
            data = {key: batch[key]["data"].float() for key in KEYS}
            yield {**data, "location": batch["location"], "meta": {key: batch[key] for key in KEYS}}
