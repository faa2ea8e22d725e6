# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers. They read statistics and never touch the queue's insides."""

from __future__ import annotations

from .priorities import PriorityHandler
from .queue_report import QueueReportHandler
from .queue_stats import QueueStatsHandler

__all__ = ["PriorityHandler", "QueueReportHandler", "QueueStatsHandler"]
