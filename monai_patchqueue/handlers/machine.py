# SPDX-License-Identifier: Apache-2.0
"""What the run takes of the machine: memory, and the GPU's time and memory where there is one."""

from __future__ import annotations

import logging
import time
from multiprocessing import active_children

import psutil
import torch

__all__ = ["MachineMonitor"]

logger = logging.getLogger(__name__)

_EFFORT = 0.001


class MachineMonitor:
    """Looks at memory and GPU now and then; NVIDIA's own figures change no faster than every sixth of a second.

    ``memory_bytes`` is the resident memory of this process and of those that it started, whose shared memory counts
    once (but not the pages that a forked one has of this process). ``gpu_utilization`` is the share of the last moments
    in which the GPU was computing, from NVIDIA's management library through ``torch.cuda.utilization`` (package
    ``nvidia-ml-py``, extra ``gpu``), ``gpu_memory_bytes`` what all processes hold of its memory, and
    ``gpu_allocated_bytes`` the most that tensors of this process took.

    Args:
        device: the GPU; ``None``: torch's current one. A device of another kind means no GPU.
        interval: seconds between two looks, at least; where there are many workers it is longer, so that looking takes
            no more than a thousandth of the time.
    """

    def __init__(self, device: torch.device | str | int | None = None, interval: float = 1.0) -> None:
        self._device = _gpu(device)
        self._interval = interval
        self._next = 0.0
        self._figures: dict[str, float] = {}
        self._process = psutil.Process()
        self._utilization_known = True

    def scalars(self) -> dict[str, float]:
        """The figures of the last look, or of a new one."""
        start = time.monotonic()
        if start >= self._next:
            self._figures = {"memory_bytes": self._memory(), **(self._gpu_figures() if self._device else {})}
            now = time.monotonic()
            self._next = now + max(self._interval, (now - start) / _EFFORT)
        return self._figures

    def _memory(self) -> float:
        pids = [child.pid for child in active_children() if child.pid is not None]
        return float(self._process.memory_info().rss + sum(map(_own_memory, pids)))

    def _gpu_figures(self) -> dict[str, float]:
        free, total = torch.cuda.mem_get_info(self._device)
        figures = {
            "gpu_memory_bytes": float(total - free),
            "gpu_allocated_bytes": float(torch.cuda.max_memory_allocated(self._device)),
        }
        utilization = self._utilization()
        return figures if utilization is None else {"gpu_utilization": utilization, **figures}

    def _utilization(self) -> float | None:
        if not self._utilization_known:
            return None
        try:
            return torch.cuda.utilization(self._device) / 100
        except ModuleNotFoundError:
            logger.info("no GPU utilisation: pip install nvidia-ml-py, or monai_patchqueue[gpu].")
        except Exception as error:  # the library's own classes: no permission, not supported (MIG), driver gone
            logger.info("no GPU utilisation: %s: %s", type(error).__name__, error)
        self._utilization_known = False
        return None


def _gpu(device: torch.device | str | int | None) -> torch.device | None:
    if not torch.cuda.is_available():
        return None
    given = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)
    return given if given.type == "cuda" else None


def _own_memory(pid: int) -> int:
    """Resident memory of a process without shared memory, such as the slab."""
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.Error:  # it has ended
        return 0
    return int(memory.rss - getattr(memory, "shared", 0))
