# SPDX-License-Identifier: Apache-2.0
"""Patch queues for MONAI: train on patches of 3D medical images without waiting for data."""

from __future__ import annotations

__version__ = "0.1.0"
