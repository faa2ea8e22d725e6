# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers. They read statistics and never touch the queue's insides."""

from __future__ import annotations

from monai_patchqueue.handlers.priorities import PriorityHandler
from monai_patchqueue.handlers.queue_stats import QueueStatsHandler

__all__ = ["PriorityHandler", "QueueStatsHandler"]
