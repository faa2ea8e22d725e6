# SPDX-License-Identifier: Apache-2.0
"""Who takes part: importing this registers everyone."""

from __future__ import annotations

from . import limits, monai_loaders, other_loaders, our_loaders
from .registry import CONTESTANTS, Contestant

__all__ = ["CONTESTANTS", "DEFAULT", "QUICK", "Contestant", "limits", "monai_loaders", "other_loaders", "our_loaders"]

DEFAULT = ("patchqueue", "patchqueue-reader", "patchqueue-monai-crop", "monai", "torchio")
QUICK = ("patchqueue", "monai", "torchio")
