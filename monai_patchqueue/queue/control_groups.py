# SPDX-License-Identifier: Apache-2.0
"""Where the limits of this process's control groups are written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["ControlGroup", "control_groups"]


class ControlGroup(NamedTuple):
    """A control group's folder, and the version of its interface: 1 or 2."""

    folder: Path
    version: int


def control_groups(
    controller: str, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[ControlGroup]:
    """The control groups that limit this process, those around its own included.

    Args:
        controller: of version 1, such as ``"memory"`` or ``"cpu"``; in version 2 they share one hierarchy.
        root: where control groups are mounted.
        own: the file that says which groups the process is in.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, version = root, 2
        elif controller in controllers.split(","):
            base, version = root / controller, 1
        else:
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            if base != group and base not in group.parents:
                break
            yield ControlGroup(group, version)
