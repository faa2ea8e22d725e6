# SPDX-License-Identifier: Apache-2.0
"""Indices that travel with an item."""

from __future__ import annotations


class ReusableIndex:
    """An index of a volume that travels with the item it was made for."""
