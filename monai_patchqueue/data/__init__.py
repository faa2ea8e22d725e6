# SPDX-License-Identifier: Apache-2.0
"""The queue's public faces."""

from .patch_queue_dataset import PatchQueueDataset
from .patch_queue_loader import PatchQueueLoader

__all__ = ["PatchQueueDataset", "PatchQueueLoader"]
