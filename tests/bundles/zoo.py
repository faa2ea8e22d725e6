# SPDX-License-Identifier: Apache-2.0
"""Bundles in the shape of the model zoo's for segmentation, written for MONAI's loader, and small data for them.

The names of config items, their order and their ways to refer to each other are those that the zoo's bundles have in
common; networks and volumes are tiny.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml

from tests.volumes import blobs

Config = dict[str, Any]
KEYS = ["image", "label"]
AFFINE = np.array([[-1.4, 0.2, 0, 30], [0.2, 1.4, 0, -20], [0, 0, 2.1, 5], [0, 0, 0, 1]])
"""Left-posterior-superior with a rotation, and about the spacing that the bundles resample to."""
VOLUMES, VALIDATION = 6, 2

LOAD: list[Config] = [
    {"_target_": "LoadImaged", "keys": KEYS},
    {"_target_": "EnsureChannelFirstd", "keys": KEYS},
    {"_target_": "Orientationd", "keys": KEYS, "axcodes": "RAS", "labels": None},
    {"_target_": "Spacingd", "keys": KEYS, "pixdim": [1.5, 1.5, 2.0], "mode": ["bilinear", "nearest"]},
]
SCALE: list[Config] = [
    {
        "_target_": "ScaleIntensityRanged",
        "keys": "image",
        "a_min": -57,
        "a_max": 164,
        "b_min": 0,
        "b_max": 1,
        "clip": True,
    },
    {"_target_": "EnsureTyped", "keys": KEYS},
]
FLIPS: list[Config] = [{"_target_": "RandFlipd", "keys": KEYS, "prob": 0.5, "spatial_axis": axis} for axis in range(3)]
LOSS_OUTPUT = "$monai.handlers.from_engine(['loss'], first=True)"
PRED_AND_LABEL = "$monai.handlers.from_engine(['pred', 'label'])"


def _pos_neg(num_samples: int) -> Config:
    return {
        "_target_": "RandCropByPosNegLabeld",
        "keys": KEYS,
        "label_key": "label",
        "spatial_size": "@patch_size",
        "pos": 1,
        "neg": 1,
        "num_samples": num_samples,
        "image_key": "image",
        "image_threshold": 0,
    }


def _by_argmax(classes: int) -> list[Config]:
    return [
        {"_target_": "Activationsd", "keys": "pred", "softmax": True},
        {"_target_": "AsDiscreted", "keys": ["pred", "label"], "argmax": [True, False], "to_onehot": classes},
    ]


def _bundle(
    network: Config,
    loss: Config,
    deterministic: list[Config],
    random: list[Config],
    dataset: Config,
    batch_size: int,
    postprocessing: list[Config],
) -> Config:
    stats = {"_target_": "StatsHandler", "tag_name": "train_loss", "output_transform": LOSS_OUTPUT}
    board = {"_target_": "TensorBoardStatsHandler", "log_dir": "@output_dir", "tag_name": "train_loss"}
    validation_dataset = {key: value for key, value in dataset.items() if key != "cache_dir"}
    if dataset["_target_"] == "PersistentDataset":
        validation_dataset["_target_"] = "Dataset"
    return {
        "imports": ["$import glob", "$import os", "$import ignite"],
        "bundle_root": ".",
        "ckpt_dir": "$@bundle_root + '/models'",
        "output_dir": "$@bundle_root + '/eval'",
        "dataset_dir": "$@bundle_root + '/data'",
        "images": "$list(sorted(glob.glob(@dataset_dir + '/imagesTr/*.nii.gz')))",
        "labels": "$list(sorted(glob.glob(@dataset_dir + '/labelsTr/*.nii.gz')))",
        "num_validation": VALIDATION,
        "patch_size": [16, 16, 16],
        "epochs": 2,
        "learning_rate": 0.001,
        "val_interval": 1,
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "loss": loss,
        "optimizer": {
            "_target_": "torch.optim.Adam",
            "params": "$@network.parameters()",
            "lr": "@learning_rate",
        },
        "train": {
            "deterministic_transforms": deterministic,
            "random_transforms": random,
            "preprocessing": {
                "_target_": "Compose",
                "transforms": "$@train#deterministic_transforms + @train#random_transforms",
            },
            "dataset": {
                **dataset,
                "data": "$[{'image': i, 'label': l} for i, l in "
                "zip(@images[:-@num_validation], @labels[:-@num_validation])]",
                "transform": "@train#preprocessing",
            },
            "dataloader": {
                "_target_": "DataLoader",
                "dataset": "@train#dataset",
                "batch_size": batch_size,
                "shuffle": True,
                "num_workers": 2,
            },
            "inferer": {"_target_": "SimpleInferer"},
            "postprocessing": {"_target_": "Compose", "transforms": postprocessing},
            "handlers": [
                {
                    "_target_": "ValidationHandler",
                    "validator": "@validate#evaluator",
                    "epoch_level": True,
                    "interval": "@val_interval",
                },
                stats,
                {**board, "output_transform": LOSS_OUTPUT},
            ],
            "key_metric": {"train_mean_dice": {"_target_": "MeanDice", "output_transform": PRED_AND_LABEL}},
            "trainer": {
                "_target_": "SupervisedTrainer",
                "max_epochs": "@epochs",
                "device": "@device",
                "train_data_loader": "@train#dataloader",
                "network": "@network",
                "loss_function": "@loss",
                "optimizer": "@optimizer",
                "inferer": "@train#inferer",
                "postprocessing": "@train#postprocessing",
                "key_train_metric": "@train#key_metric",
                "train_handlers": "@train#handlers",
            },
        },
        "validate": {
            "preprocessing": {"_target_": "Compose", "transforms": "%train#deterministic_transforms"},
            "dataset": {
                **validation_dataset,
                "data": "$[{'image': i, 'label': l} for i, l in "
                "zip(@images[-@num_validation:], @labels[-@num_validation:])]",
                "transform": "@validate#preprocessing",
            },
            "dataloader": {
                "_target_": "DataLoader",
                "dataset": "@validate#dataset",
                "batch_size": 1,
                "shuffle": False,
                "num_workers": 0,
            },
            "inferer": {
                "_target_": "SlidingWindowInferer",
                "roi_size": "@patch_size",
                "sw_batch_size": 4,
                "overlap": 0.25,
            },
            "postprocessing": "%train#postprocessing",
            "handlers": [
                {"_target_": "StatsHandler", "iteration_log": False},
                {"_target_": "TensorBoardStatsHandler", "log_dir": "@output_dir", "iteration_log": False},
                {
                    "_target_": "CheckpointSaver",
                    "save_dir": "@ckpt_dir",
                    "save_dict": {"model": "@network"},
                    "save_key_metric": True,
                    "key_metric_filename": "model.pt",
                },
            ],
            "key_metric": {
                "val_mean_dice": {
                    "_target_": "MeanDice",
                    "include_background": False,
                    "output_transform": PRED_AND_LABEL,
                }
            },
            "evaluator": {
                "_target_": "SupervisedEvaluator",
                "device": "@device",
                "val_data_loader": "@validate#dataloader",
                "network": "@network",
                "inferer": "@validate#inferer",
                "postprocessing": "@validate#postprocessing",
                "key_val_metric": "@validate#key_metric",
                "val_handlers": "@validate#handlers",
            },
        },
        "initialize": ["$monai.utils.set_determinism(seed=123)"],
        "run": ["$@train#trainer.run()"],
    }


def _cached(cache_rate: float = 1.0) -> Config:
    return {"_target_": "CacheDataset", "cache_rate": cache_rate, "num_workers": 2, "progress": False}


def spleen_ct() -> Config:
    """One organ, UNet, cached volumes, four patches of each by label, two volumes a batch."""
    network = {
        "_target_": "UNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 2,
        "channels": [4, 8],
        "strides": [2],
        "num_res_units": 2,
        "norm": "batch",
    }
    loss = {"_target_": "DiceCELoss", "include_background": False, "to_onehot_y": True, "softmax": True, "batch": True}
    return _bundle(network, loss, [*LOAD, *SCALE], [_pos_neg(4)], _cached(), 2, _by_argmax(2))


def swin_unetr_btcv() -> Config:
    """Fourteen classes, Swin UNETR, flips, rotations and shifts of intensity after the crop."""
    network = {
        "_target_": "SwinUNETR",
        "in_channels": 1,
        "out_channels": 14,
        "feature_size": 12,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 1, 1],
        "window_size": 4,
        "norm_name": "batch",
    }
    loss = {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True, "squared_pred": True, "batch": True}
    augmentation = [
        *FLIPS,
        {"_target_": "RandRotate90d", "keys": KEYS, "max_k": 3, "prob": 0.1},
        {"_target_": "RandShiftIntensityd", "keys": "image", "offsets": 0.1, "prob": 0.5},
    ]
    config = _bundle(network, loss, [*LOAD, *SCALE], [_pos_neg(2), *augmentation], _cached(), 2, _by_argmax(14))
    return {**config, "patch_size": [32, 32, 32], "epochs": 1}


def whole_body_ct() -> Config:
    """A hundred and five classes, SegResNet, volumes read anew in each epoch, one patch of each anywhere."""
    network = {
        "_target_": "SegResNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 105,
        "init_filters": 8,
        "blocks_down": [1, 1],
        "blocks_up": [1],
        "dropout_prob": 0.2,
    }
    deterministic = [
        *LOAD,
        {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True},
        {
            "_target_": "CropForegroundd",
            "keys": KEYS,
            "source_key": "image",
            "margin": 2,
            "k_divisible": [16, 16, 16],
            "allow_smaller": True,
        },
        {"_target_": "GaussianSmoothd", "keys": ["image"], "sigma": 0.4},
        {"_target_": "ScaleIntensityd", "keys": "image", "minv": -1.0, "maxv": 1.0},
        {"_target_": "EnsureTyped", "keys": KEYS},
    ]
    crop = {"_target_": "RandSpatialCropd", "keys": KEYS, "roi_size": "@patch_size", "random_size": False}
    loss = {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True}
    return _bundle(network, loss, deterministic, [crop], {"_target_": "Dataset"}, 1, _by_argmax(105))


def brats_mri() -> Config:
    """Four channels, three overlapping regions made of the label, one patch of a volume anywhere, in both of them."""
    network = {
        "_target_": "SegResNet",
        "in_channels": 4,
        "out_channels": 3,
        "init_filters": 8,
        "blocks_down": [1, 1],
        "blocks_up": [1],
        "dropout_prob": 0.2,
    }
    loss = {"_target_": "DiceLoss", "smooth_nr": 0, "smooth_dr": 1e-5, "sigmoid": True}
    deterministic: list[Config] = [
        {"_target_": "LoadImaged", "keys": KEYS},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "ConvertToMultiChannelBasedOnBratsClassesd", "keys": "label"},
        {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True},
    ]
    random = [
        {"_target_": "RandSpatialCropd", "keys": KEYS, "roi_size": "@patch_size", "random_size": False},
        *FLIPS,
        {"_target_": "RandScaleIntensityd", "keys": "image", "factors": 0.1, "prob": 1.0},
        {"_target_": "RandShiftIntensityd", "keys": "image", "offsets": 0.1, "prob": 1.0},
    ]
    output = [
        {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
        {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
    ]
    config = _bundle(network, loss, deterministic, random, {"_target_": "Dataset"}, 1, output)
    config["lr_scheduler"] = {
        "_target_": "torch.optim.lr_scheduler.CosineAnnealingLR",
        "optimizer": "@optimizer",
        "T_max": "@epochs",
    }
    schedule = {"_target_": "LrScheduleHandler", "lr_scheduler": "@lr_scheduler", "print_lr": True}
    config["train"]["handlers"].insert(0, schedule)
    return config


def pancreas_ct_dints() -> Config:
    """A searched network, expressions in Python as transforms, a label of its own for the crop, part of it cached."""
    space = {
        "_target_": "TopologyInstance",
        "channel_mul": 0.2,
        "num_blocks": 2,
        "num_depths": 2,
        "use_downsample": True,
        "arch_code": ["$@arch_code['arch_code_a']", "$@arch_code['arch_code_c']"],
        "device": "cpu",
    }
    network = {
        "_target_": "DiNTS",
        "dints_space": "@dints_space",
        "in_channels": 1,
        "num_classes": "@output_classes",
        "use_downsample": True,
        "node_a": "$@arch_code['node_a']",
    }
    loss = {"_target_": "DiceCELoss", "include_background": False, "to_onehot_y": True, "softmax": True, "batch": True}
    dilate = (
        "$lambda x, s=@output_classes: np.concatenate(tuple(ndimage.binary_dilation("
        "(x == k).astype(x.dtype), iterations=2).astype(x.dtype) for k in range(s)), axis=0)"
    )
    deterministic: list[Config] = [
        *LOAD,
        *SCALE[:1],
        {"_target_": "CastToTyped", "keys": KEYS, "dtype": ["$np.float16", "$np.uint8"]},
        {"_target_": "CopyItemsd", "keys": "label", "times": 1, "names": ["label4crop"]},
        {"_target_": "ToNumpyd", "keys": "label4crop"},
        {"_target_": "Lambdad", "keys": "label4crop", "func": dilate, "overwrite": True},
        {"_target_": "EnsureTyped", "keys": KEYS},
        {"_target_": "CastToTyped", "keys": "image", "dtype": "$torch.float32"},
        {
            "_target_": "SpatialPadd",
            "keys": [*KEYS, "label4crop"],
            "spatial_size": "@patch_size",
            "mode": ["reflect", "constant", "constant"],
        },
    ]
    random: list[Config] = [
        {
            "_target_": "RandCropByLabelClassesd",
            "keys": KEYS,
            "label_key": "label4crop",
            "num_classes": "@output_classes",
            "ratios": "$[1,] * @output_classes",
            "spatial_size": "@patch_size",
            "num_samples": 1,
        },
        {"_target_": "Lambdad", "keys": "label4crop", "func": "$lambda x: 0"},
        {
            "_target_": "RandZoomd",
            "keys": KEYS,
            "min_zoom": 0.8,
            "max_zoom": 1.2,
            "mode": ["trilinear", "nearest"],
            "prob": 0.3,
        },
        {"_target_": "RandGaussianNoised", "keys": "image", "std": 0.01, "prob": 0.15},
        *FLIPS,
        {"_target_": "CastToTyped", "keys": KEYS, "dtype": ["$torch.float32", "$torch.uint8"]},
        {"_target_": "ToTensord", "keys": KEYS},
    ]
    output = _by_argmax(3)
    config = _bundle(network, loss, deterministic, random, _cached(0.5), 2, output)
    config["imports"].append("$from scipy import ndimage")
    config["output_classes"] = 3
    config["dints_space"] = space
    config["arch_code"] = (
        "${'arch_code_a': np.ones((2, 4)), 'arch_code_c': np.ones((2, 4), dtype=int), 'node_a': torch.ones((3, 2))}"
    )
    # What validates has no crop: the label for it stays out.
    config["validate"]["preprocessing"]["transforms"] = [*LOAD, *SCALE]
    return config


BUNDLES: dict[str, Callable[[], Config]] = {
    function.__name__: function
    for function in (spleen_ct, swin_unetr_btcv, whole_body_ct, brats_mri, pancreas_ct_dints)
}

MULTI_GPU: Config = {
    "network": {
        "_target_": "torch.nn.parallel.DistributedDataParallel",
        "module": "$@network_def.to(@device)",
        "find_unused_parameters": True,
    },
    "train#sampler": {
        "_target_": "DistributedSampler",
        "dataset": "@train#dataset",
        "even_divisible": True,
        "shuffle": True,
    },
    "train#dataloader#sampler": "@train#sampler",
    "train#dataloader#shuffle": False,
    "train#trainer#train_handlers": "$@train#handlers[: -2 if dist.get_rank() > 0 else None]",
    "validate#sampler": {
        "_target_": "DistributedSampler",
        "dataset": "@validate#dataset",
        "even_divisible": False,
        "shuffle": False,
    },
    "validate#dataloader#sampler": "@validate#sampler",
    "validate#evaluator#val_handlers": "$None if dist.get_rank() > 0 else @validate#handlers",
    "initialize": [
        "$import torch.distributed as dist",
        "$dist.is_initialized() or dist.init_process_group(backend='gloo')",
        "$monai.utils.set_determinism(seed=123)",
        "$import logging",
        "$@train#trainer.logger.setLevel(logging.WARNING if dist.get_rank() > 0 else logging.INFO)",
        "$@validate#evaluator.logger.setLevel(logging.WARNING if dist.get_rank() > 0 else logging.INFO)",
    ],
    "run": ["$@train#trainer.run()"],
    "finalize": ["$dist.is_initialized() and dist.destroy_process_group()"],
}
"""As ``multi_gpu_train.json`` has it, for CPUs."""


def write_bundle(folder: Path, name: str, suffix: str = ".json") -> Path:
    """Write a bundle with its data; gives the file of its training config."""
    configs = folder / "configs"
    configs.mkdir(parents=True)
    dump = json.dumps if suffix == ".json" else yaml.safe_dump
    train = configs / f"train{suffix}"
    train.write_text(dump({**BUNDLES[name](), "bundle_root": str(folder)}))
    (configs / f"multi_gpu_train{suffix}").write_text(dump(MULTI_GPU))
    (configs / "metadata.json").write_text("{}")
    channels = 4 if name == "brats_mri" else 1
    classes = {"spleen_ct": 1, "swin_unetr_btcv": 13, "pancreas_ct_dints": 2, "brats_mri": 3}.get(name, 20)
    write_volumes(folder / "data", channels, classes)
    return train


def write_volumes(folder: Path, channels: int, classes: int, shape: tuple[int, ...] = (36, 38, 34)) -> None:
    """Write images of whose intensity the label's values are a part."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for case in range(VOLUMES):
        label = blobs(*shape, classes=classes, seed=case)[0]
        noise = np.random.default_rng(case).normal(size=(*shape, channels))
        image = (20 + 60 * noise + 40 * label[..., None]).astype(np.int16)
        image = image if channels > 1 else image[..., 0]
        for part, array in (("imagesTr", image), ("labelsTr", label)):
            nib.save(nib.Nifti1Image(array, AFFINE), folder / part / f"case_{case}.nii.gz")
