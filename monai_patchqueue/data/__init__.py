# SPDX-License-Identifier: Apache-2.0
"""The queue's public faces."""

from .buffers import ProcessBufferLoader, ThreadBufferLoader, iterate_buffered
from .chunked_dataset import ChunkedDataset
from .collate import collate_patches
from .data_module import PatchDataModule
from .grid_patch_loader import GridPatchLoader
from .patch_queue_dataset import PatchQueueDataset
from .patch_queue_loader import PatchQueueLoader
from .random_queue_dataset import RandomQueueDataset
from .split_check import SampleReport
from .thread_loader import PatchThreadDataLoader

__all__ = [
    "ChunkedDataset",
    "GridPatchLoader",
    "PatchDataModule",
    "PatchQueueDataset",
    "PatchQueueLoader",
    "PatchThreadDataLoader",
    "ProcessBufferLoader",
    "RandomQueueDataset",
    "SampleReport",
    "ThreadBufferLoader",
    "collate_patches",
    "iterate_buffered",
]
