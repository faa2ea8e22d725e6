# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms that give the patches of a volume; the array classes beside their dictionary versions."""

from __future__ import annotations

from .array import *
from .array import __all__ as _array
from .dictionary import *
from .dictionary import __all__ as _dictionary

__all__ = [*_array, *_dictionary]
