# SPDX-License-Identifier: Apache-2.0
"""This process among those of a distributed run."""

from __future__ import annotations

import torch

__all__ = ["ranks"]


def ranks() -> tuple[int, int]:
    """This process's rank in a distributed run, and how many processes there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
