# SPDX-License-Identifier: Apache-2.0
"""The queue itself: schedule, slab, producers, statistics. Its public faces are in ``monai_patchqueue.data``."""

from .stats import QueueStats

__all__ = ["QueueStats"]
