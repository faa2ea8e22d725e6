# SPDX-License-Identifier: Apache-2.0
"""How much memory this process may use, and how long a queue fits into it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil

from .control_groups import control_groups

__all__ = ["available_memory", "format_bytes", "parse_budget", "ranks_on_this_host"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_budget(budget: float | int | str) -> float | int:
    """A budget as a fraction (float up to 1) or a number of bytes (int).

    Raises:
        TypeError: neither a number nor a string.
        ValueError: nothing, less than nothing, or an unknown unit.

    Example:
        >>> parse_budget("8GiB"), parse_budget("500 MB"), parse_budget(0.25), parse_budget(2e9)
        (8589934592, 500000000, 0.25, 2000000000)
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise TypeError(
            f"ram_budget={budget!r}: expected a fraction up to 1.0, a number of bytes, or a text like '8GiB'."
        )
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]i?)?b?\s*", budget, re.IGNORECASE)
        if not match:
            raise ValueError(f"ram_budget={budget!r}: expected a number with a unit, for instance '8GiB' or '500MB'.")
        budget = int(float(match[1]) * _UNITS[(match[2] or "").lower()])
    if not 0 < budget < float("inf"):
        raise ValueError(f"ram_budget={budget!r}: expected more than nothing, and an end.")
    return budget if isinstance(budget, float) and budget <= 1 else int(budget)


def format_bytes(nbytes: float) -> str:
    """Bytes for people.

    Example:
        >>> format_bytes(3 * 2**20)
        '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def ranks_on_this_host() -> int:
    """Processes of one distributed run that share this machine's memory, as torchrun says."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1), 1)


def available_memory() -> int:
    """Bytes that this process may still use: of the machine, and of its control groups (v1 and v2)."""
    return min([psutil.virtual_memory().available, *_control_group_rest()])


def _control_group_rest(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What the limits of this process's control groups leave, those of the groups around it included."""
    rest = []
    for group in control_groups("memory", root, own):
        if group.version == 2:
            limit, usage, reclaimable = "memory.max", "memory.current", "inactive_file"
        else:
            limit, usage, reclaimable = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        allowed, used = _number(group.folder / limit), _number(group.folder / usage)
        if allowed is not None and used is not None:
            rest.append(max(allowed - used + _statistic(group.folder / "memory.stat", reclaimable), 0))
    return rest


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _statistic(file: Path, name: str) -> int:
    try:
        return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(name + " "))
    except (OSError, StopIteration):
        return 0
