# SPDX-License-Identifier: Apache-2.0
"""Volumes that were prepared beforehand: our store, MONAI's and nnU-Net's. They lie beside the volumes' files, and are
made by the process that checks what is delivered: that is not timed.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .setup import CLASS_PROBABILITIES, NUM_CLASSES, Setup

NNUNET_LOCATIONS = 10000  # voxels of each class that nnU-Net keeps


def folder_for(setup: Setup, name: str) -> Path:
    """Where a store of these volumes lies."""
    return Path(setup.items[0]["image"]).parent / name


def chunked(setup: Setup, transforms: Sequence[Any]) -> Any:
    """A ``ChunkedDataset``, prepared for these patches."""
    from monai.transforms import Compose

    from monai_patchqueue import ChunkedDataset

    dataset = ChunkedDataset(setup.items, Compose(transforms), folder_for(setup, "chunked"))
    dataset.prepare(progress=False)
    return dataset


def persistent(setup: Setup, transforms: Sequence[Any]) -> Any:
    """MONAI's ``PersistentDataset``, prepared."""
    from monai.data import PersistentDataset
    from monai.transforms import Compose

    folder = folder_for(setup, "persistent")
    # With weights_only=True, the default, it cannot load the metadata that it wrote, and prepares each volume anew.
    dataset = PersistentDataset(setup.items, Compose(transforms), folder, track_meta=True, weights_only=False)
    if len([*folder.glob("*.pt")]) < len(setup.items):
        for number in range(len(dataset)):
            dataset[number]
    return dataset


class NnunetBatches:
    """nnU-Net v2's own dataset, loader and workers, with foreground in every patch; an epoch is a number of batches.

    Args:
        setup: what all run on.
        normalize: z-score the images, as nnU-Net's preparation does; else they keep the scanner's integers, as floats.
    """

    def __init__(self, setup: Setup, normalize: bool) -> None:
        from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
        from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
        from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
        from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
        from nnunetv2.utilities.label_handling.label_handling import LabelManager

        folder = _nnunet_folder(setup, normalize)
        prepare_nnunet(setup, normalize)
        names = {"background": 0, **{f"class {c}": c for c in range(1, NUM_CLASSES)}}
        size = (setup.patch_size,) * 3
        loader = nnUNetDataLoader(
            nnUNetDatasetBlosc2(str(folder)), setup.batch_size, size, size, LabelManager(names, None), 1.0
        )
        if setup.num_workers:
            self.batches = NonDetMultiThreadedAugmenter(
                loader, None, setup.num_workers, max(6, setup.num_workers // 2), wait_time=0.002
            )
        else:
            self.batches = SingleThreadedAugmenter(loader, None)
        self.count = setup.patches_per_epoch // setup.batch_size

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for _ in range(self.count):
            batch = next(self.batches)
            yield {"image": batch["data"], "label": batch["target"]}


def _nnunet_folder(setup: Setup, normalize: bool) -> Path:
    """One for each number of volumes and size of patches, for which nnU-Net chooses blocks and chunks."""
    kind = "nnunet-normalized" if normalize else "nnunet"
    return folder_for(setup, f"{kind}-{len(setup.items)}-{setup.patch_size}")


def prepare_nnunet(setup: Setup, normalize: bool) -> None:
    """Write what ``nnUNetv2_preprocess`` writes of volumes that it need not resample."""
    import nibabel as nib
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    folder = _nnunet_folder(setup, normalize)
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(setup.seed)
    for number, item in enumerate(setup.items):
        target = folder / f"case_{number:03d}"
        if Path(f"{target}.pkl").exists():
            continue
        image = np.asarray(nib.load(item["image"]).dataobj).astype(np.float32)[None]
        label = np.asarray(nib.load(item["label"]).dataobj).astype(np.int8)[None]
        if normalize:
            image = (image - image.mean()) / image.std()
        size = (setup.patch_size,) * 3
        blocks, chunks = comp_blosc2_params(image.shape, size, image.itemsize)
        blocks_seg, chunks_seg = comp_blosc2_params(label.shape, size, label.itemsize)
        locations = {c: np.argwhere(label == c) for c in CLASS_PROBABILITIES}
        kept = {c: rng.permutation(found)[:NNUNET_LOCATIONS] for c, found in locations.items()}
        nnUNetDatasetBlosc2.save_case(
            image, label, {}, str(target), chunks=chunks, blocks=blocks, chunks_seg=chunks_seg, blocks_seg=blocks_seg
        )
        unfinished = Path(f"{target}.unfinished")
        unfinished.write_bytes(pickle.dumps({"class_locations": kept}))
        os.replace(unfinished, f"{target}.pkl")
