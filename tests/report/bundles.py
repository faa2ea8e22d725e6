# SPDX-License-Identifier: Apache-2.0
"""Small bundles that know nothing of this package, and whose network must not be built."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from monai_patchqueue.data.synthetic import make_synthetic_dataset

CONFIG: dict[str, Any] = {
    "datalist": "$monai.data.load_decathlon_datalist(@dataset_dir + '/dataset.json')",
    "num_workers": 1,
    "samples": 4,
    "network": "$1 / 0",
    "train": {
        "crop": {
            "_target_": "RandCropByPosNegLabeld",
            "keys": ["image", "label"],
            "label_key": "label",
            "spatial_size": [16, 16, 16],
            "num_samples": "@samples",
        },
        "transforms": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": ["image", "label"], "ensure_channel_first": True},
                "@train#crop",
                {"_target_": "RandFlipd", "keys": ["image", "label"], "prob": 0.5},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@train#transforms"},
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@train#dataset",
            "batch_size": 2,
            "shuffle": True,
            "num_workers": "@num_workers",
        },
        "trainer": {"_target_": "SupervisedTrainer", "train_data_loader": "@train#dataloader", "network": "@network"},
    },
    "batches": "$[len(batch['image']) for batch in @train#dataloader]",
    "run": ["$@batches"],
}


def write_bundle(folder: Path, **changes: Any) -> str:
    """A bundle's train config and four volumes in a folder; the config's path.

    Args:
        folder: for both.
        changes: values by id, in which ``__`` stands for ``#``.
    """
    config = copy.deepcopy(CONFIG)
    config["dataset_dir"] = make_synthetic_dataset(folder / "data", num_volumes=4, shape=(32, 36, 40), progress=False)
    for place, value in changes.items():
        *path, last = place.split("__")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    file = folder / "train.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return str(file)
