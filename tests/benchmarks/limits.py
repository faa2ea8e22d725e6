# SPDX-License-Identifier: Apache-2.0
"""Contestants that deliver no real patches: the least work that a way of loading has to do, and nothing besides."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from .pipelines import KEYS, Epochs, dataset, stock_loading
from .registry import Batches, contestant
from .setup import Setup


@contestant(
    "limit-decode",
    "limit: workers decompress the files (isal) into memory at hand",
    requires="isal",
    remedy="'monai_patchqueue[fast]'",
    layout=None,
    read=False,
)
def decode_only(setup: Setup) -> Batches:
    """As many processes as there are workers (one where there is none) decompress volume after volume, without a pause
    between epochs. A volume counts as the patches that are taken of it.
    """
    import nibabel as nib

    import monai_patchqueue.io.inflate  # noqa: F401, before the fork, so that no worker has to

    images = [nib.load(item[key]) for item in setup.items for key in KEYS]
    sizes = {
        image.get_filename(): image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
        for image in images
    }
    context = multiprocessing.get_context("fork")
    orders, done = context.SimpleQueue(), context.SimpleQueue()
    workers = max(1, setup.num_workers)
    for _ in range(workers):
        context.Process(target=_decode, args=(setup, sizes, orders, done), daemon=True).start()
    patches = torch.zeros(1).expand(setup.samples_per_volume, 1, *[setup.patch_size] * 3)
    for number in range(2 * workers):
        orders.put(number % len(setup.items))

    def epoch() -> Iterator[Mapping[str, Any]]:
        for number in range(len(setup.items)):
            done.get()
            orders.put((number + 2 * workers) % len(setup.items))
            yield dict.fromkeys(KEYS, patches)

    return Epochs(epoch)


def _decode(setup: Setup, sizes: Mapping[str, int], orders: Any, done: Any) -> None:
    from monai_patchqueue.io.inflate import GzipStream  # in pieces into one buffer: the fastest way that was found

    memory = memoryview(bytearray(max(sizes.values())))
    while True:
        number = orders.get()
        for key in KEYS:
            path = setup.items[number][key]
            with open(path, "rb", buffering=0) as file:
                GzipStream(file, path).fill(memory[: sizes[path]], "all")
        done.put(number)


@contestant("limit-load", "limit: LoadImaged alone, one core", layout=None)
def load_only(setup: Setup) -> Batches:
    """No crops, no workers: the first corner of each loaded volume, seen `samples_per_volume` times."""
    torch.set_num_threads(1)
    corner = (slice(None), *[slice(setup.patch_size)] * 3)
    volumes = dataset(setup, stock_loading())

    def epoch() -> Iterator[Mapping[str, Any]]:
        for number in range(len(volumes)):
            volume = volumes[number]
            yield {key: volume[key][corner].expand(setup.samples_per_volume, 1, -1, -1, -1) for key in KEYS}

    return Epochs(epoch)


@contestant("limit-memmap", "limit: copy of patches from mapped .nii files, one core", layout=None, read=False)
def memmap_only(setup: Setup) -> Batches:
    """Patches at random places, in the file's dtype and order of axes, into a batch that is used again."""
    import nibabel as nib

    volumes = [[np.asarray(nib.load(item[key]).dataobj.get_unscaled()).T for key in KEYS] for item in setup.items]
    return _copies(setup, volumes)


@contestant("limit-copy", "limit: copy of patches in RAM, one core", layout=None, read=False)
def copy_only(setup: Setup) -> Batches:
    """Patches at random places of float32 volumes in C order, into a batch that is used again."""
    volumes = [[volume[key].as_tensor()[0].numpy() for key in KEYS] for volume in dataset(setup, stock_loading())]
    return _copies(setup, volumes)


@contestant("limit-ram", "limit: gathering and reading patches in RAM, one core", layout=None)
def gather_only(setup: Setup) -> Batches:
    """Batches gathered from as many patches as an epoch has, all in memory and in random order."""
    torch.set_num_threads(1)
    count, size = setup.patches_per_epoch, setup.patch_size
    patches = {key: torch.rand(count, 1, size, size, size) for key in KEYS}

    def epoch() -> Iterator[Mapping[str, Any]]:
        for chosen in torch.randperm(count).split(setup.batch_size):
            yield {key: patches[key].index_select(0, chosen) for key in KEYS}

    return Epochs(epoch)


def _copies(setup: Setup, volumes: list[list[np.ndarray]]) -> Batches:
    """Epochs of patches copied from uniformly random places of volumes, into one batch."""
    rng = np.random.default_rng(setup.seed)
    shape = (setup.batch_size, 1, *[setup.patch_size] * 3)
    batch = [np.zeros(shape, volume.dtype) for volume in volumes[0]]
    handed_out = {key: torch.from_numpy(array) for key, array in zip(KEYS, batch, strict=True)}

    def epoch() -> Iterator[Mapping[str, Any]]:
        order = rng.permutation(np.repeat(np.arange(len(volumes)), setup.samples_per_volume))
        for first in range(0, len(order), setup.batch_size):
            chosen = order[first : first + setup.batch_size]
            for slot, number in enumerate(chosen):
                starts = [rng.integers(n - setup.patch_size + 1) for n in volumes[number][0].shape]
                window = tuple(slice(start, start + setup.patch_size) for start in starts)
                for array, volume in zip(batch, volumes[number], strict=True):
                    array[slot, 0] = volume[window]
            yield {key: tensor[: len(chosen)] for key, tensor in handed_out.items()}

    return Epochs(epoch)
