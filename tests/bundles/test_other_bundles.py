# SPDX-License-Identifier: Apache-2.0
"""What the README says about bundles that know nothing of this package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from monai_patchqueue.data.synthetic import make_synthetic_dataset
from tests.programs import Interpreter

CONFIG: dict[str, Any] = {
    "bundle_root": ".",
    "datalist": "$monai.data.load_decathlon_datalist(@dataset_dir + '/dataset.json')",
    "network": {
        "_target_": "UNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 4,
        "channels": [4, 8],
        "strides": [2],
    },
    "train": {
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": ["image", "label"], "ensure_channel_first": True},
                {
                    "_target_": "RandCropByPosNegLabeld",
                    "keys": ["image", "label"],
                    "label_key": "label",
                    "spatial_size": [16, 16, 16],
                    "num_samples": 4,
                },
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@train#preprocessing"},
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@train#dataset",
            "batch_size": 2,
            "shuffle": True,
            "num_workers": 1,
        },
        "handlers": [
            {
                "_target_": "StatsHandler",
                "tag_name": "train_loss",
                "output_transform": "$monai.handlers.from_engine(['loss'], first=True)",
            }
        ],
        "trainer": {
            "_target_": "SupervisedTrainer",
            "max_epochs": 1,
            "device": "cpu",
            "train_data_loader": "@train#dataloader",
            "network": "@network",
            "loss_function": {"_target_": "DiceLoss", "to_onehot_y": True, "softmax": True},
            "optimizer": {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.01},
            "train_handlers": "@train#handlers",
        },
    },
    "initialize": ["$monai.utils.set_determinism(seed=0)"],
    "run": ["$@train#trainer.run()"],
}
VOLUMES, SAMPLES, BATCH = 4, 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other_bundle")
    make_synthetic_dataset(folder / "data", num_volumes=VOLUMES, shape=(32, 36, 40), progress=False)
    (folder / "configs").mkdir()
    (folder / "configs" / "train.json").write_text(json.dumps(CONFIG))
    (folder / "configs" / "metadata.json").write_text("{}")
    return folder


def run(interpreter: Interpreter, folder: Path, *flags: str, fresh: bool = False) -> str:
    command = ["-m", "monai.bundle", "run", "--config_file", "configs/train.json", *flags]
    program = interpreter.start(*command, "--dataset_dir", str(folder / "data"), cwd=folder, fresh=fresh)
    assert program.wait(200) == 0, program.errors[-5000:]
    return program.output + program.errors


def flags_of_the_readme() -> list[str]:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    found = re.search(r"--config_file configs/train\.json (--train#dataloader#_target_ \S+)", text)
    assert found
    return found[1].split()


def test_one_flag_puts_the_queue_in_and_the_two_meanings_of_batch_size_are_named(
    interpreter: Interpreter, folder: Path
) -> None:
    output = run(interpreter, folder, *flags_of_the_readme(), fresh=True)
    batches = VOLUMES * SAMPLES // BATCH
    assert f"Iter: {batches}/{batches} --" in output
    assert "batch_unit" in output


def test_batch_unit_volume_keeps_monais_number_of_batches(interpreter: Interpreter, folder: Path) -> None:
    output = run(interpreter, folder, *flags_of_the_readme(), "--train#dataloader#batch_unit", "volume")
    batches = VOLUMES // BATCH
    assert f"Iter: {batches}/{batches} --" in output
    assert "counts patches here" not in output
