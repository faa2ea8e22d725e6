# SPDX-License-Identifier: Apache-2.0
"""How many processors this process may use."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["available_cpus"]


def available_cpus(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Processors that this process may use: those it is bound to, at most its control group's quota (v1 and v2).

    A container with a quota of one and a half processors has 1.5.
    """
    if hasattr(os, "sched_getaffinity"):
        bound = len(os.sched_getaffinity(0))
    else:
        bound = os.cpu_count() or 1
    return min([float(bound), *_quotas(root)])


def _quotas(root: Path) -> list[float]:
    quotas = []
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((root / file).read_text() for file in files).split()
            if float(quota) > 0:
                quotas.append(float(quota) / float(period))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return quotas
