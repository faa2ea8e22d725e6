# SPDX-License-Identifier: Apache-2.0
"""How many processors this process may use."""

from __future__ import annotations

import os
from pathlib import Path

from .control_groups import ControlGroup, control_groups

__all__ = ["available_cpus"]


def available_cpus(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Processors that this process may use: those it is bound to, at most its control groups' quotas (v1 and v2).

    A container with a quota of one and a half processors has 1.5.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_quota(group) for group in control_groups("cpu", root, own)]
    return min([float(bound), *(quota for quota in quotas if quota is not None)])


def _quota(group: ControlGroup) -> float | None:
    """CPU time per time; ``None`` where there is no limit."""
    try:
        if group.version == 2:
            quota, period = (group.folder / "cpu.max").read_text().split()
        else:
            quota, period = ((group.folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        limit = int(quota) / int(period)
    except (OSError, ValueError):  # no such group, or "max"
        return None
    return limit if limit > 0 else None
