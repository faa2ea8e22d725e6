# SPDX-License-Identifier: Apache-2.0
"""Reading volumes: NIfTI files at the speed of their decompression, and volumes of which only patches are read."""

from __future__ import annotations

from .lazy_meta_tensor import LazyMetaTensor
from .reader import FastNiftiReader

__all__ = ["FastNiftiReader", "LazyMetaTensor"]
